import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Return a new cache for the test."""
    monkeypatch.setenv("METADIST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def no_data(monkeypatch):
    """Unset METADIST_DATA for the test."""
    monkeypatch.delenv("METADIST_DATA", raising=False)
