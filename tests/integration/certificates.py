"""Certificates for one test run, made by OpenSSL's command: an authority and what it signs."""

from pathlib import Path

from servers.local import run_tool

_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-noenc")
# Nothing of the machine's own openssl.cnf: what a certificate is for is said here.
_CONFIG = "[req]\ndistinguished_name = name\n[name]\n"


class Authority:
    """Signs certificates, whose files lie in its directory. Any user of the machine can read them.

    A server in a container runs as another user than the tests.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        directory.chmod(0o755)
        self.directory = directory
        self.certificate = directory / "ca.pem"
        (directory / "openssl.cnf").write_text(_CONFIG)
        self._make(
            "ca", "authority", "basicConstraints=critical,CA:TRUE", "keyUsage=critical,keyCertSign"
        )

    def sign(self, name: str, *addresses: str) -> tuple[Path, Path]:
        """Return the files of a certificate and its key, for a client or for a server.

        `addresses` are a server's, as in "IP:127.0.0.1" or "DNS:localhost".
        """
        extensions = ["basicConstraints=CA:FALSE", "extendedKeyUsage=serverAuth,clientAuth"]
        if addresses:
            extensions.append(f"subjectAltName={','.join(addresses)}")
        authority = ("-CA", str(self.certificate), "-CAkey", str(self.directory / "ca.key"))
        return self._make(name, name, *extensions, signed_by=authority)

    def _make(
        self, file: str, subject: str, *extensions: str, signed_by: tuple[str, ...] = ()
    ) -> tuple[Path, Path]:
        certificate, key = self.directory / f"{file}.pem", self.directory / f"{file}.key"
        added = [part for extension in extensions for part in ("-addext", extension)]
        run_tool(
            [
                "openssl",
                "req",
                "-x509",
                "-config",
                str(self.directory / "openssl.cnf"),
                *_KEY,
                "-keyout",
                str(key),
                "-out",
                str(certificate),
                "-days",
                "2",
                "-subj",
                f"/CN={subject}",
                *signed_by,
                *added,
            ]
        )
        key.chmod(0o644)
        return certificate, key
