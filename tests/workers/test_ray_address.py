"""What RAY_ADDRESS may be."""

from __future__ import annotations

import pytest

from metadist.core.errors import ConfigError
from metadist.workers.ray.environment import reach


@pytest.mark.parametrize(
    ("address", "hint"),
    [
        ("http://10.0.0.1:8265", "metadist submit --address http://10.0.0.1:8265"),
        ("https://ray.example", "metadist submit"),
        ("10.0.0.1", "expected HOST:6379"),
        ("grpc://10.0.0.1:6379", "expected HOST:6379"),
        ("10.0.0.1:6379 ", "expected HOST:6379"),
        ("10.0.0.1:head", "ray://HOST:10001"),
    ],
)
def test_another_form_is_refused_with_the_expected_one(address, hint):
    with pytest.raises(ConfigError) as refused:
        reach(address)
    assert str(refused.value).startswith(f"RAY_ADDRESS={address}: ")
    assert hint in str(refused.value)


@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:9", "[::1]:9", "localhost:9"])
def test_an_address_of_the_right_form_is_tried(address):
    with pytest.raises(OSError):
        reach(address, timeout=1.0)


def test_words_that_ray_knows_are_left_to_ray():
    reach("auto")
    reach("local")
