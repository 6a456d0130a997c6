"""A server on this machine plays the hub.

What is fetched, what is resumed, and what does each refusal say?
"""
import http.server
import json
import multiprocessing
import os
import threading
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from conftest import ROOT

FILES = {path.name: path.read_bytes() for path in (ROOT / "tiny").iterdir()
         if path.suffix in (".json", ".safetensors")}
COMMIT = "0123456789abcdef0123456789abcdef01234567"
# New processes are forked from one that has imported PyTorch, which takes longer than a download.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch._dynamo", "tokenizers"])


class Hub(http.server.BaseHTTPRequestHandler):
    """org/tiny is the embedded default, org/gated asks for terms, and any other name is missing.

    cut: the names of files whose first download breaks off.
    """
    cut, seen, files = set(), [], FILES

    def log_message(self, *args):
        pass

    def refuse(self, status, code):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def answer(self, body):
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            name, revision = "/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main"
        else:
            name, revision = "/".join(parts[:2]), parts[3] if len(parts) > 3 else ""
        if name == "org/gated":
            return self.refuse(403, "GatedRepo")
        if name != "org/tiny":
            return self.refuse(404, "RepoNotFound")
        if revision not in ("main", "v1", COMMIT):
            return self.refuse(404, "RevisionNotFound")
        if parts[0] == "api" and "tree" in parts:
            tree = [{"type": "file", "path": name, "size": len(data), "oid": name}
                    for name, data in Hub.files.items()]
            data, headers = json.dumps(tree).encode(), {}
        elif parts[0] == "api":
            siblings = [{"rfilename": name} for name in FILES]
            data = json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode()
            headers = {}
        else:
            data = Hub.files[parts[-1]]
            headers = {"ETag": f'"{parts[-1]}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        start = 0
        if "Range" in self.headers:
            start = int(self.headers["Range"].split("=")[1].split("-")[0])
        self.send_response(206 if start else 200)
        for key, value in headers.items():
            self.send_header(key, value)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if body:
            Hub.seen.append((parts[-1], start))
            if parts[-1] in Hub.cut:
                Hub.cut.remove(parts[-1])
                self.wfile.write(data[start:len(data) // 2])
                self.close_connection = True
            else:
                self.wfile.write(data[start:])

    def do_GET(self):
        self.answer(True)

    def do_HEAD(self):
        self.answer(False)


@pytest.fixture
def hub(tmp_path):
    pytest.importorskip("huggingface_hub", reason="the hub library is not installed")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Hub.cut, Hub.seen, Hub.files = set(), [], FILES
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def fetch(folder, endpoint, *models, **more):
    """Load models by their names, one after the other, in a process of its own.

    It does so as a command would. The exit code is that of the last model. The hub library reads
    the environment when it is imported.
    """
    environment = {name: value for name, value in os.environ.items()
                   if not name.startswith("HF_") and "proxy" not in name.lower()}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "hf"),
                    "HF_HUB_DISABLE_XET": "1"} | more
    out, err = folder / "out.txt", folder / "err.txt"
    code = (
        "import os, sys\n"
        "assert 'huggingface_hub' not in sys.modules\n"
        "os.environ.clear()\n"
        f"os.environ.update({environment!r})\n"
        f"sys.stdout, sys.stderr = open({str(out)!r}, 'w'), open({str(err)!r}, 'w')\n"
        "from model import load\n"
        "from support.console import run_command\n"
        f"for name in {models!r}:\n"
        "    code = run_command(lambda: print(load(name)[0].folder))\n"
        "sys.exit(code)"
    )
    process = FORKS.Process(target=exec, args=(code, {}))
    process.start()
    process.join(120)
    process.kill()
    process.join()
    return SimpleNamespace(returncode=process.exitcode, stdout=out.read_text(),
                           stderr=err.read_text())


def test_a_hub_model_is_fetched_once_and_then_found_offline(tmp_path, hub):
    done = fetch(tmp_path, hub, "org/tiny@v1")
    assert done.returncode == 0, done.stderr
    assert COMMIT in done.stdout, done.stderr
    assert {name for name, _ in Hub.seen} >= set(FILES)
    Hub.seen.clear()
    again = fetch(tmp_path, "http://127.0.0.1:9", f"org/tiny@{COMMIT}")
    assert again.returncode == 0, again.stderr
    assert again.stdout == done.stdout, again.stderr
    assert not Hub.seen, again.stderr


def test_a_download_that_broke_off_is_resumed(tmp_path, hub):
    weights = safetensors.torch.load(FILES["model.safetensors"])
    # The library writes 10 MB at once, so the file must be longer than that.
    weights |= {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(6_000_000)}
    Hub.cut = {"model.safetensors"}
    Hub.files = FILES | {"model.safetensors": safetensors.torch.save(weights)}
    done = fetch(tmp_path, hub, "org/tiny")
    if done.returncode:  # the library may retry by itself, or leave that to the next command
        assert done.returncode == 2 and "Traceback" not in done.stderr
        done = fetch(tmp_path, hub, "org/tiny")
    assert done.returncode == 0, done.stderr
    starts = [start for name, start in Hub.seen if name == "model.safetensors"]
    assert starts[-1] > 0  # it went on from the middle


def test_refusals_are_one_line(tmp_path, hub):
    models = ["org/missing", "org/gated", "org/tiny@v2"]
    done = fetch(tmp_path, hub, *models)
    missing, gated, revision = done.stderr.strip().splitlines()
    assert done.returncode == 2
    assert "no such model on the hub" in missing
    assert "accept their terms" in gated
    assert "no revision 'v2'" in revision


@pytest.mark.parametrize("more", [{}, {"HF_HUB_OFFLINE": "1"}])
def test_no_network_says_to_name_a_folder(tmp_path, more):
    done = fetch(tmp_path, "http://127.0.0.1:9", "org/tiny", **more)
    assert done.returncode == 2 and "name a local folder" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
