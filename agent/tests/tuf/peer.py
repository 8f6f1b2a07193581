"""python-tuf, the specification's reference implementation, as the other side: it publishes repositories and serves them, and its
client reads others'. One JSON object a line on standard input is a request; one on standard output is its answer.
"""

import http.server
import json
import sys
import threading
from datetime import datetime, timezone
from pathlib import Path
from urllib.parse import quote, unquote

from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Key,
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)
from tuf.api.serialization.json import JSONSerializer
from tuf.ngclient import Updater
from tuf.ngclient.config import UpdaterConfig

TOP = ("root", "timestamp", "snapshot", "targets")
EXPIRES = datetime(2035, 1, 1, tzinfo=timezone.utc)


def new_signer(scheme):
    if scheme == "ed25519":
        return CryptoSigner.generate_ed25519()
    if scheme == "rsassa-pss-sha256":
        return CryptoSigner.generate_rsa()
    if scheme == "ecdsa-sha2-nistp256":
        return CryptoSigner.generate_ecdsa()
    raise ValueError(scheme)


class Opaque(Key):
    """A key that is only written."""

    @classmethod
    def from_dict(cls, keyid, key_dict):
        names = ("keytype", "scheme", "keyval")
        return cls(keyid, *(key_dict.pop(name) for name in names), key_dict)

    def to_dict(self):
        return self._to_dict()

    def verify_signature(self, signature, data):
        raise NotImplementedError


class Repository:
    """Metadata to change, the keys that sign it, and the directory where it is published."""

    def __init__(self, directory, scheme="ed25519"):
        self.directory = Path(directory)
        (self.directory / "metadata").mkdir(parents=True)
        (self.directory / "targets").mkdir()
        self.scheme = scheme
        self.hashes = False
        self.pool = {}
        self.signers = {role: [] for role in TOP}
        self.published = set()
        self.roles = {
            "root": Root(expires=EXPIRES),
            "timestamp": Timestamp(expires=EXPIRES),
            "snapshot": Snapshot(expires=EXPIRES),
            "targets": Targets(expires=EXPIRES),
        }
        for role in TOP:
            self.key(role)
        self.publish("targets", "snapshot", "timestamp", "root")

    def signer(self, name=None, scheme=None):
        scheme = scheme or self.scheme
        if name is None:
            return new_signer(scheme)
        if (name, scheme) not in self.pool:
            self.pool[name, scheme] = new_signer(scheme)
        return self.pool[name, scheme]

    def key(self, role, delegator="root", name=None, scheme=None):
        """One more key for the role, which also signs."""
        signer = self.signer(name, scheme)
        self.roles[delegator].add_key(signer.public_key, role)
        self.signers.setdefault(role, []).append(signer)
        return signer.public_key.keyid

    def keys(self, role, keys, threshold, signs):
        """These keys, by name, and no others are the role's; these sign."""
        self.roles["root"].roles[role].keyids.clear()
        for name in keys:
            self.roles["root"].add_key(self.signer(name).public_key, role)
        self.roles["root"].roles[role].threshold = threshold
        self.signers[role] = [self.signer(name) for name in signs]

    def rotate(self, role):
        self.roles["root"].roles[role].keyids.clear()
        self.signers[role].clear()
        return self.key(role)

    def threshold(self, role, threshold):
        self.roles["root"].roles[role].threshold = threshold

    def unsign(self, role):
        self.signers[role].pop()

    def set(self, role, **fields):
        """`version` is what the next publication counts on from."""
        for field, value in fields.items():
            if field == "expires":
                value = datetime.fromisoformat(value)
            setattr(self.roles[role], field, value)

    def extra(self, role, **fields):
        self.roles[role].unrecognized_fields.update(fields)

    def extra_key(self, keyid, key, role=None):
        """A key as it stands here, perhaps of a kind that nobody knows, or in another spelling."""
        root = self.roles["root"]
        root.keys[keyid] = Opaque.from_dict(keyid, key.copy())
        if role and keyid not in root.roles[role].keyids:
            root.roles[role].keyids.append(keyid)

    def announce(self, role, **fields):
        """What is said of the role's file, however untrue."""
        for field, value in fields.items():
            if role == "snapshot":
                setattr(self.roles["timestamp"].snapshot_meta, field, value)
            else:
                setattr(self.roles["snapshot"].meta[f"{role}.json"], field, value)

    def unlist(self, role):
        del self.roles["snapshot"].meta[f"{role}.json"]

    def delegate(self, delegator, role, paths=None, prefixes=None, terminating=False):
        above = self.roles[delegator]
        if above.delegations is None:
            above.delegations = Delegations({}, {})
        above.delegations.roles[role] = DelegatedRole(
            role, [], 1, terminating, paths, prefixes
        )
        self.roles.setdefault(role, Targets(expires=EXPIRES))
        return self.key(role, delegator)

    def target(self, role, path, content, hashes=("sha256",), rename=None):
        """`rename` calls the hash something else."""
        content = content.encode()
        file = TargetFile.from_data(path, content, list(hashes))
        if rename:
            file.hashes = {rename: value for value in file.hashes.values()}
        self.roles[role].targets[path] = file
        for digest in file.hashes.values():
            folder, _, name = path.rpartition("/")
            place = self.directory / "targets" / folder / f"{digest}.{name}"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)

    def publish(self, *roles):
        """Signs each as its next version, and tells the one above."""
        for role in roles:
            signed = self.roles[role]
            if role in self.published:
                signed.version += 1
            self.published.add(role)
            metadata = Metadata(signed, {})
            for signer in self.signers[role]:
                metadata.sign(signer, append=True)
            data = metadata.to_bytes(JSONSerializer())
            name = quote(role, "")
            name = name if role == "timestamp" else f"{signed.version}.{name}"
            (self.directory / "metadata" / f"{name}.json").write_bytes(data)
            announced = MetaFile(signed.version)
            if self.hashes:
                announced = MetaFile.from_data(signed.version, data, ["sha256"])
            if role == "snapshot":
                self.roles["timestamp"].snapshot_meta = announced
            elif role not in TOP or role == "targets":
                self.roles["snapshot"].meta[f"{role}.json"] = announced

    def announce_hashes(self):
        self.hashes = True


class Peer:
    def __init__(self):
        self.repository = None
        self.requests = []
        self.servers = []

    def new(self, **arguments):
        self.requests.clear()
        self.repository = Repository(**arguments)

    def serve(self, directory):
        """Until the end, on a port of its own; its URL."""
        requests = self.requests

        class Handler(http.server.SimpleHTTPRequestHandler):
            def __init__(self, *arguments, **keywords):
                super().__init__(*arguments, directory=directory, **keywords)

            def translate_path(self, path):
                # A file may have an escape in its name.
                return str(Path(self.directory) / path.lstrip("/"))

            def log_request(self, *_):
                requests.append(self.path.lstrip("/"))

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}/"

    def requested(self):
        requests = self.requests.copy()
        self.requests.clear()
        return requests

    def read(self, url, root, directory, targets=()):
        """What python-tuf's own client makes of a repository: the version of each role, and where the targets are."""
        metadata, downloads = Path(directory) / "metadata", Path(directory) / "targets"
        metadata.mkdir(parents=True, exist_ok=True)
        downloads.mkdir(exist_ok=True)
        updater = Updater(
            str(metadata),
            f"{url}metadata/",
            str(downloads),
            f"{url}targets/",
            config=UpdaterConfig(),
            bootstrap=Path(root).read_bytes(),
        )
        updater.refresh()
        files = {}
        for path in targets:
            info = updater.get_targetinfo(path)
            if info is None:
                raise ValueError(f"no target {path}")
            files[path] = updater.download_target(info)
        versions = {
            unquote(file.stem): json.loads(file.read_text())["signed"]["version"]
            for file in metadata.glob("*.json")
        }
        return {"versions": versions, "files": files}


def main():
    peer = Peer()
    for line in sys.stdin:
        call = json.loads(line)
        name, arguments, keywords = call["do"], call.get("with", []), call.get("by", {})
        owner = peer if hasattr(peer, name) else peer.repository
        try:
            answer = {"ok": getattr(owner, name)(*arguments, **keywords)}
        except Exception as error:  # noqa: BLE001
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


main()
