"""Tell which S3 server is talked to, and set what other servers than Amazon's need."""

from __future__ import annotations

import os
from contextlib import suppress
from urllib.parse import urlparse

from alignclip.errors import UserError, without_secrets

ENDPOINTS = ("S3_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
CHECKSUM_SETTINGS = ("request_checksum_calculation", "response_checksum_validation")


def expect_plain_s3() -> None:
    """Have boto3 leave out the checksums that only Amazon's own servers are sure to know.

    Since 1.36 boto3 sends a checksum with each upload, which many other servers answer with 501,
    400 or 403. Where another endpoint is set, this makes boto3 send them only where S3 requires
    them. A person's own setting stays. Ranks, data workers and uploaders inherit the environment;
    call this before any of them makes a client.

    Raises:
        UserError: the endpoint's URL holds a password: clients show the URL in their errors.
    """
    for name in ENDPOINTS:
        if without_secrets(url := os.environ.get(name, "")) != url:
            raise UserError(
                f"{name} holds a password, which S3 has no use for; put the keys into "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            )
    if not is_foreign():
        return
    for setting in CHECKSUM_SETTINGS:
        if f"AWS_{setting.upper()}" not in os.environ and not in_profile(setting):
            os.environ[f"AWS_{setting.upper()}"] = "when_required"


def is_foreign() -> bool:
    """Return whether S3 is told to be another server than Amazon's, or is Google's S3 interface."""
    hosts = [_host(os.environ[name]) for name in ENDPOINTS if os.environ.get(name)]
    return any(not host.endswith((".amazonaws.com", ".amazonaws.com.cn")) for host in hosts) or (
        "GCS_KEY" in os.environ and "GCS_SECRET" in os.environ
    )


def _host(url: str) -> str:
    """Return a URL's host; nothing where the URL is none, which is told where a client is made."""
    with suppress(ValueError):
        return urlparse(url).hostname or ""
    return ""


def in_profile(setting: str) -> bool:
    """Return whether ``~/.aws/config`` has the setting."""
    # no botocore, or a profile that isn't there: told where a client is made
    with suppress(Exception):
        from botocore.session import get_session

        return setting in get_session().get_scoped_config()
    return False
