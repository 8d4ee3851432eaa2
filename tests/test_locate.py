"""Downloads against a server of our own that ranges, breaks, changes and lies as real ones do."""

import contextlib
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from classiclm.data import locate as module
from classiclm.data.locate import Download, cache_folder, locate
from classiclm.errors import BAD_INPUT, RESOURCE, Error
from classiclm.files import sha256

BODY = bytes(range(256)) * 2000  # 512,000 bytes
OTHER = bytes(reversed(BODY))
SUM = sha256(BODY)
PLACE = "folder/file.bin"


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers by the server's list of plans, one for each request; the last one stays."""

    def do_GET(self):
        server = self.server
        server.asked.append((self.path, dict(self.headers)))
        plan = {"body": BODY, **(server.plans.pop(0) if len(server.plans) > 1 else server.plans[0])}
        body, status, start = plan["body"], plan.get("status", 200), 0
        wanted = self.headers.get("Range")
        same = self.headers.get("If-Range") in (None, plan.get("tag"))
        if status == 200 and wanted and same and plan.get("ranges", True):
            start, status = int(wanted.removeprefix("bytes=").removesuffix("-")), 206
            status = status if start < len(body) else 416
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", plan.get("said", f"bytes {start}-{len(body) - 1}/{len(body)}"))
        if status == 416:
            self.send_header("Content-Range", f"bytes */{len(body)}")
        if "tag" in plan:
            self.send_header("ETag", plan["tag"])
        self.send_header("Content-Type", plan.get("type", "application/octet-stream"))
        rest = body[start:] if status == 206 else body if status == 200 else b"no"
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client may have been killed
            self.send_slowly(rest[: plan.get("break", len(rest))], plan.get("pause", 0))
        self.close_connection = True

    def send_slowly(self, data, pause):
        for i in range(0, len(data), 4096 if pause else len(data) or 1):
            self.wfile.write(data[i : i + (4096 if pause else len(data))])
            time.sleep(pause)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A server on this machine; `plans` says how it answers, `asked` what it was asked."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CLASSICLM_DATA", raising=False)
    monkeypatch.setattr(module, "_PAUSE", 0.01)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.plans = [], [{}]
    server.url = f"http://127.0.0.1:{server.server_address[1]}/file.bin"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def download(server, digest=SUM, place=PLACE, mirrors=()):
    return Download(place, server.url, digest, tuple(server.url + name for name in mirrors))


def target(place=PLACE):
    return cache_folder() / place


def part():
    return target().with_name("file.bin.part")


def ranges(server):
    return [headers.get("Range") for _, headers in server.asked]


def failure(*arguments):
    with pytest.raises(Error) as caught:
        locate(*arguments)
    assert "\n" not in str(caught.value)
    return caught.value


def test_a_download_that_breaks_goes_on_where_it_was(server):
    server.plans = [{"break": 100_000, "tag": '"a"'}, {"tag": '"a"', "break": 200_000}, {"tag": '"a"'}]
    assert locate(download(server)).read_bytes() == BODY
    assert ranges(server) == [None, "bytes=100000-", "bytes=300000-"]
    assert server.asked[1][1]["If-Range"] == '"a"'
    assert sorted(path.name for path in target().parent.iterdir()) == ["file.bin"]


def test_many_breaks_are_no_failure_as_long_as_each_brings_something(server):
    server.plans = [{"break": 60_000, "tag": '"a"'}]
    assert locate(download(server)).read_bytes() == BODY
    assert len(server.asked) == 9


def test_a_server_that_cannot_range_sends_all_again(server):
    server.plans = [{"break": 100_000, "ranges": False, "tag": '"a"'}, {"ranges": False, "tag": '"a"'}]
    assert locate(download(server)).read_bytes() == BODY


def test_a_server_that_always_breaks_at_the_same_byte_is_given_up_and_the_part_stays(server):
    server.plans = [{"break": 100_000, "ranges": False}]
    error = failure(download(server))
    assert "the connection ended after 100000 of 512000 bytes" in str(error)
    assert len(server.asked) == 4  # the first brought something, three more did not
    assert not target().exists()
    assert part().read_bytes() == BODY[:100_000]


@pytest.mark.parametrize("digest", [sha256(OTHER), None])
def test_a_file_that_changed_meanwhile_is_fetched_from_its_beginning(server, digest):
    server.plans = [{"break": 100_000, "tag": '"a"'}, {"body": OTHER, "tag": '"b"'}]
    assert locate(download(server, digest)).read_bytes() == OTHER


def test_without_a_mark_or_a_known_sum_nothing_is_appended(server):
    server.plans = [{"break": 100_000}, {"body": OTHER}]
    assert locate(download(server, None)).read_bytes() == OTHER
    assert ranges(server) == [None, None]


def test_a_part_of_another_version_is_found_out_by_the_sum_and_fetched_again(server):
    part().parent.mkdir(parents=True)
    part().write_bytes(OTHER[:1000])
    assert locate(download(server)).read_bytes() == BODY
    assert ranges(server) == ["bytes=1000-", None]


def test_a_part_that_is_whole_is_taken_without_sending_it_again(server):
    part().parent.mkdir(parents=True)
    part().write_bytes(BODY)
    assert locate(download(server)).read_bytes() == BODY
    assert ranges(server) == [f"bytes={len(BODY)}-"]


def test_a_part_that_is_longer_than_the_file_is_thrown_away(server):
    part().parent.mkdir(parents=True)
    part().write_bytes(BODY + b"more")
    assert locate(download(server)).read_bytes() == BODY


def test_a_range_that_was_not_asked_for_is_not_appended(server):
    wrong = {"tag": '"a"', "said": "bytes 0-511999/512000", "body": OTHER}
    server.plans = [{"break": 1000, "tag": '"a"'}, wrong, {"tag": '"a"'}]
    assert locate(download(server, None)).read_bytes() == BODY


def test_a_busy_server_is_asked_again(server):
    server.plans = [{"status": 503}, {"status": 429}, {}]
    assert locate(download(server)).read_bytes() == BODY


def test_a_server_that_stays_busy_is_given_up_after_three_times(server):
    server.plans = [{"status": 503}]
    assert "503" in str(failure(download(server)))
    assert len(server.asked) == 3


def test_mirrors_are_tried_in_their_order_and_a_missing_page_once(server):
    server.plans = [{"status": 404}, {"status": 404}, {}]
    assert locate(download(server, mirrors=("?one", "?two", "?three"))).read_bytes() == BODY
    assert [path for path, _ in server.asked] == ["/file.bin", "/file.bin?one", "/file.bin?two"]


def test_a_mirror_continues_what_another_began_if_the_sum_is_known(server):
    server.plans = [{"break": 100_000, "ranges": False}] * 4 + [{}]
    assert locate(download(server, mirrors=("?one",))).read_bytes() == BODY
    assert ranges(server)[-1] == "bytes=100000-"


def test_a_mirror_continues_nothing_if_the_sum_is_not_known(server):
    plan = {"break": 100_000, "ranges": False, "tag": '"a"'}
    server.plans = [plan] * 4 + [{"body": OTHER, "tag": '"a"'}]
    assert locate(download(server, None, mirrors=("?one",))).read_bytes() == OTHER


def test_when_all_addresses_fail_each_is_named_with_its_reason(server):
    server.plans = [{"status": 404}, {"body": OTHER}]
    error = failure(download(server, mirrors=("?one",)))
    assert error.code == BAD_INPUT
    assert f"{server.url}: 404" in str(error)
    assert f"{server.url}?one: the download has a wrong sha256" in str(error)
    assert str(target()) in str(error)
    assert "CLASSICLM_DATA" in str(error)
    assert not list(target().parent.iterdir())


@pytest.mark.parametrize(
    "plan",
    [
        {"body": b"\n<!DOCTYPE html><p>Sign in"},
        {"body": b"<HTML>Sign in"},
        {"body": b"Sign in", "type": "text/html; charset=utf-8"},
    ],
)
@pytest.mark.parametrize("digest", [sha256(BODY), None])
def test_a_web_page_in_place_of_the_file_is_refused(server, plan, digest):
    server.plans = [plan]
    assert "a web page came instead" in str(failure(download(server, digest)))
    assert not list(target().parent.iterdir())


def test_a_web_page_is_welcome_where_one_was_asked_for(server):
    server.plans = [{"body": b"<html>text", "type": "text/html"}]
    assert locate(download(server, None, "folder/page.html")).read_bytes() == b"<html>text"


def test_the_sum_of_the_first_download_is_kept_and_holds_from_then_on(server):
    path = locate(download(server, None))
    record = path.with_name("file.bin.sha256")
    assert record.read_text() == f"{sha256(BODY)}  file.bin\n"
    assert locate(download(server, None)) == path
    path.write_bytes(OTHER)
    error = failure(download(server, None))
    assert error.code == BAD_INPUT
    assert "file.bin.sha256" in str(error)
    assert len(server.asked) == 1


def test_a_cache_that_cannot_be_written_is_a_matter_of_resources(server, tmp_path):
    (tmp_path / "cache").write_text("a file where a folder has to be")
    assert failure(download(server)).code == RESOURCE


def test_a_full_disk_is_a_matter_of_resources_and_leaves_no_wrong_file(server):
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        error = failure(download(server))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)
    assert error.code == RESOURCE
    assert not target().exists()
    assert locate(download(server)).read_bytes() == BODY


def test_a_long_download_tells_how_far_it_is_and_a_short_one_is_silent(server, monkeypatch, capsys):
    locate(download(server))
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(module, "_REPORT_EVERY", 0.0)
    server.plans = [{"pause": 0.001}]
    locate(download(server, place="folder/again.bin"))
    out, err = capsys.readouterr()
    assert out == ""
    assert "folder/again.bin: 0 of 1 MB" in err


def test_of_three_downloads_at_once_one_is_made_and_the_others_wait_for_it(server):
    server.plans = [{"pause": 0.001}]
    threads = [threading.Thread(target=locate, args=(download(server, None),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert target().read_bytes() == BODY
    assert len(server.asked) == 1


CHILD = """
import json, sys
from classiclm.data.locate import Download, locate
locate(Download(**json.loads(sys.argv[1])))
"""


@pytest.mark.parametrize("digest", [sha256(BODY), None])
def test_a_kill_at_any_time_leaves_no_wrong_file_and_a_part_that_goes_on(server, digest):
    server.plans = [{"pause": 0.005, "tag": '"a"'}]
    about = json.dumps({"place": PLACE, "url": server.url, "sha256": digest})
    grown = 0
    for _ in range(3):
        child = subprocess.Popen([sys.executable, "-c", CHILD, about], env=os.environ)
        wait_until(lambda grown=grown: part().exists() and part().stat().st_size > grown + 20_000)
        child.kill()
        child.wait()
        assert not target().exists()
        assert part().read_bytes() == BODY[: part().stat().st_size]
        grown = part().stat().st_size
    server.plans = [{"tag": '"a"'}]
    assert locate(download(server, digest)).read_bytes() == BODY
    assert ranges(server)[-1] == f"bytes={grown}-"


def wait_until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)
