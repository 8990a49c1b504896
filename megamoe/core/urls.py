"""Names of shards that are not local files: their scheme, and how to show them without their secrets."""

from __future__ import annotations

import re
from functools import lru_cache

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*")
# What a signature adds to a URL: of S3 and CloudFront, Google, Azure. Only where there is one of _SIGNATURES are the others
# taken for a part of it: `sp=3` alone may be a page's number.
_SIGNATURES = frozenset({"x-amz-signature", "x-goog-signature", "signature", "sig"})
_SIGNED = re.compile(
    r"x-(amz|goog)-.*|signature|expires|awsaccesskeyid|googleaccessid|policy|key-pair-id|"
    r"sig|sv|ss|srt|sp|se|st|spr|sr|sip|si|sdd|ske|skt|sks|skv|skoid|sktid|saoid|suoid|scid"
)
_USER = re.compile(r"(?<=://)(?:[^/\s'\"]*:[^/\s'\"]*|(?<=http://)[^/\s'\"]+|(?<=https://)[^/\s'\"]+)@")
_QUERY = re.compile(r"(https?://[^\s'\"?]*)\?[^\s'\"]+|\?[^\s'\"]*=[^\s'\"]*")  # signatures of pre-signed URLs
_HEADER = re.compile(r"\b(bearer|basic|token)\s+[^\s'\"]+|((?<=-key:)|(?<=-token:))\s*[^\s'\"]+", re.IGNORECASE)
_SETTING = re.compile(r"((?:password|passwd|secret|token|key)[\w-]*=)[^\s'\"&]+", re.IGNORECASE)
_PLAIN = re.compile(r"(?:[a-z0-9]+://)?[\w./%+,~-]*")  # has room for nothing of the above
_LONGEST = 300  # characters of a reason: servers and commands may send whole pages


def scheme(shard: str) -> str | None:
    """Return ``http``, ``s3``, ``pipe``, ...; None for a local path."""
    head, colon, rest = shard.partition(":")
    return _kind(head, rest.startswith("//")) if colon else None


@lru_cache(256)  # hundreds of thousands of names have one between them
def _kind(head: str, slashes: bool) -> str | None:
    if head == "pipe":
        return head
    return head.lower() if slashes and _SCHEME.fullmatch(head) else None


def unsigned(shard: str) -> str:
    """Strip the signature of a pre-signed URL: what is left names the same object whoever signed it, and whenever."""
    if not shard.startswith(("http://", "https://")) or "?" not in shard:
        return shard
    path, _, query = shard.partition("?")
    parameters = [(each.partition("=")[0].lower(), each) for each in query.split("&")]
    if not _SIGNATURES & {name for name, _ in parameters}:
        return shard
    kept = "&".join(each for name, each in parameters if not _SIGNED.fullmatch(name))
    return f"{path}?{kept}" if kept else path


def is_plain(text: str) -> bool:
    """Return whether ``text`` has room for neither a query nor a secret, as nearly all of many names."""
    return _PLAIN.fullmatch(text) is not None


def masked(text: str) -> str:
    """Replace user names, passwords, query strings and tokens in the URLs and commands of ``text`` by ``***``."""
    if is_plain(text):
        return text
    text = _QUERY.sub(r"\1?***", _USER.sub("***@", text))
    return _SETTING.sub(r"\1***", _HEADER.sub(r"\1 ***", text))


def one_line(text: str) -> str:
    """Make foreign ``text`` fit into a message: one short line, masked."""
    line = " ".join(masked(text).split())
    printable = "".join(character if character.isprintable() else "?" for character in line)
    return printable if len(printable) <= _LONGEST else f"{printable[:_LONGEST]}..."
