"""What S3 and boto3 say, said again in one sentence that names the object and the remedy, and holds no secret."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import botocore.exceptions as errors
from boto3.exceptions import S3UploadFailedError

from cluster.errors import UserError
from cluster.storage import missing

_ABSENT = {"NoSuchKey", "404"}
_TAKEN = {"PreconditionFailed", "412"}
_BAD_CREDENTIALS = {
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "TokenRefreshRequired",
    "InvalidClientTokenId",
}
_DENIED = {"AccessDenied", "AllAccessDisabled", "AccountProblem", "403"}
_ELSEWHERE = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "301"}
_FULL = {"QuotaExceeded", "InsufficientCapacity", "507"}
_BUSY = {"SlowDown", "ServiceUnavailable", "InternalError", "Throttling", "RequestLimitExceeded", "500", "503"}


def endpoint_url() -> str | None:
    """The S3 server named by the environment, None for AWS.

    Raises:
        UserError: It is no plain URL; it is not repeated, since it may hold a password.
    """
    url = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None
    if url:
        check_endpoint(url)
    return url


def check_endpoint(url: str) -> None:
    """Refuse what is no plain URL of a server.

    Raises:
        UserError: It is not repeated, since it may hold a password.
    """
    if not re.fullmatch(r"https?://[^@/\s]+/?", url):
        raise UserError(
            "AWS_ENDPOINT_URL must read http://host:port or https://host:port; give credentials by boto3's own chain"
        )


class TakenError(UserError):
    """A conditional put found the name taken."""


class PastTheEndError(UserError):
    """A range begins behind the end of the object."""


@contextmanager
def plain_errors(bucket: str, uri: str) -> Iterator[None]:
    """Turn boto3's exceptions into one sentence that names the object and the remedy, and holds no secret."""
    try:
        yield
    except S3UploadFailedError as error:  # wraps a ClientError and keeps only its text
        cause = error.__cause__ or error.__context__
        code = cause.response["Error"]["Code"] if isinstance(cause, errors.ClientError) else "upload failed"
        raise _refusal(code, uri, bucket) from error
    except errors.ClientError as error:
        raise _refusal(error.response["Error"]["Code"], uri, bucket) from error
    except (errors.NoCredentialsError, errors.PartialCredentialsError) as error:
        raise UserError(
            f"no credentials for {uri} were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
            "AWS_PROFILE, or give the machine a role"
        ) from error
    except errors.ProfileNotFound as error:
        name = os.environ.get("AWS_PROFILE") or os.environ.get("AWS_DEFAULT_PROFILE")
        raise UserError(f"AWS profile {name!r} for {uri} is not in ~/.aws; make it or unset AWS_PROFILE") from error
    except (errors.HTTPClientError, errors.ConnectionError) as error:  # refused, unknown host, timeouts, TLS
        raise UserError(
            f"{_server()} cannot be reached for {uri} ({type(error).__name__}); check the network and AWS_ENDPOINT_URL"
        ) from error
    except errors.BotoCoreError as error:
        raise UserError(f"{uri} cannot be used: {type(error).__name__}; check the AWS settings") from error


def _refusal(code: str, uri: str, bucket: str) -> UserError:
    """What is said when the server answered with an error code; its own message is not repeated."""
    if code in _ABSENT:
        return missing(uri)
    if code in _TAKEN:
        return TakenError(f"{uri} exists already")
    if code == "InvalidRange":
        return PastTheEndError(f"{uri} is shorter than was asked for")
    said = {
        "NoSuchBucket": f"bucket {bucket!r} of {uri} does not exist; make it first or correct the name",
        "RequestTimeTooSkewed": f"{_server()} refused {uri}: this machine's clock is wrong; set it (NTP)",
    }
    groups = (
        (_BAD_CREDENTIALS, f"{_server()} refused the credentials for {uri} ({code}); renew or correct them"),
        (
            _DENIED,
            f"access to {uri} is denied ({code}); correct the credentials, or allow s3:GetObject, s3:PutObject, "
            "s3:DeleteObject and s3:ListBucket",
        ),
        (_ELSEWHERE, f"bucket {bucket!r} of {uri} is in another region ({code}); set AWS_DEFAULT_REGION to it"),
        (_FULL, f"{_server()} has no space left for {uri} ({code}); free some or raise the quota"),
        (_BUSY, f"{_server()} kept failing for {uri} ({code}); start again later, the run goes on where it was"),
    )
    for codes, sentence in groups:
        if code in codes:
            return UserError(sentence)
    return UserError(said.get(code, f"{_server()} refused {uri} ({code}); check bucket, prefix and permissions"))


def _server() -> str:
    """The server's host and port."""
    url = urlsplit(endpoint_url() or "")
    return f"S3 server {url.hostname}{f':{url.port}' if url.port else ''}" if url.hostname else "AWS S3"
