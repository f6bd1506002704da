"""Addresses are shown without the password in them, and otherwise as they are."""

import pytest

from waferlab.tracking.addresses import without_password


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("postgresql+psycopg://me:s3cret@db:5432/optuna", "postgresql+psycopg://me@db:5432/optuna"),
        ("http://me@mlflow:5000", "http://me@mlflow:5000"),
        ("http://127.0.0.1:5000 (no models:/wafer@champion)", "http://127.0.0.1:5000 (no models:/wafer@champion)"),
        ("sqlite:////tmp/a:b@c.db", "sqlite:////tmp/a:b@c.db"),
    ],
)
def test_only_the_password_is_left_out(address, shown):
    assert without_password(address) == shown
