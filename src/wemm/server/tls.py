"""PEM files → the TLS of a listener, with an error that names the file at fault."""

from __future__ import annotations

import ssl
import stat
from dataclasses import dataclass, field
from pathlib import Path

from wemm.errors import ParameterError


@dataclass(frozen=True)
class TlsConfig:
    """PEM files of a listener that speaks TLS."""

    certificate: Path
    key: Path
    client_ca: Path | None = None
    """Clients must show a certificate of this authority."""
    key_password: str | None = field(default=None, repr=False)

    def context(self) -> ssl.SSLContext:
        """Read the files. Raises ParameterError that names the one at fault."""
        for what, path in (("certificate", self.certificate), ("key", self.key), ("client CA", self.client_ca)):
            if path is not None:
                _check_readable(what, path)
        mode = stat.S_IMODE(self.key.stat().st_mode)
        if mode & 0o077:
            raise ParameterError(f"TLS key {self.key} is open to others (mode {mode:04o}); chmod 600 {self.key}")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_RENEGOTIATION
        context.set_alpn_protocols(["http/1.1"])
        _load_certificates("certificate", self.certificate, ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
        try:
            # The password is a function so that OpenSSL never asks a terminal for it.
            context.load_cert_chain(self.certificate, self.key, lambda: self.key_password or "")
        except (ssl.SSLError, ValueError) as error:
            if getattr(error, "reason", None) == "KEY_VALUES_MISMATCH":
                raise ParameterError(
                    f"TLS key {self.key} does not belong to certificate {self.certificate}"
                ) from None
            raise ParameterError(
                f"TLS key {self.key} is no PEM private key, or its password is missing or wrong"
            ) from None
        if self.client_ca is not None:
            _load_certificates("client CA", self.client_ca, context)
            context.verify_mode = ssl.CERT_REQUIRED
        return context


def _check_readable(what: str, path: Path) -> None:
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise ParameterError(f"TLS {what} {path} cannot be read: {error.strerror}") from None


def _load_certificates(what: str, path: Path, context: ssl.SSLContext) -> None:
    try:
        context.load_verify_locations(cafile=path)
    except ssl.SSLError:
        raise ParameterError(f"TLS {what} {path} holds no PEM certificate") from None
