import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setenv("METADIST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def no_data(monkeypatch):
    """METADIST_DATA unset, whatever it is outside."""
    monkeypatch.delenv("METADIST_DATA", raising=False)
