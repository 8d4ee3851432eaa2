"""How fast text becomes token shards, beside datasets.map and the bare encoder, on the same text in one run.

    python -m benchmarks prepare --data $CLASSICLM_DATA [--copies 200] [--repeats 3]
    python -m benchmarks prepare --memory 200 2000        # MB of text: peak memory of the whole process tree

Text: tiny Shakespeare and WikiText-2 (validation), repeated, in documents of about 5 kB, as jsonl. GPT-2's vocabulary,
one process per core. Interleaved, medians of the repeats:

    encoder       the encoder alone: text in memory, ids thrown away, one process per core, no start-up counted
    ours          classiclm prepare, from the command to the finished folder, sums and fsync included
    map+tiktoken  nanoGPT's way: datasets.map(num_proc) with tiktoken, then the ids of 1,024 batches into a memmap
    map+library   the same with the tokenizers library, batched
    ours+library  classiclm prepare without tiktoken

The peers start from a dataset that is in Arrow form already; ours starts from the file.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

SOURCE = Path(__file__).resolve().parent.parent / "src"
DOCUMENT = 5000  # characters
WAYS = ["encoder", "ours", "map+tiktoken", "ours+library", "map+library"]
FILES = {"shakespeare": "shakespeare/input.txt", "wikitext": "wikitext2/valid.txt"}


def texts_of(text: str, copies: int) -> list[str]:
    """Documents of about 5 kB, cut at line breaks."""
    parts, start = [], 0
    while start < len(text):
        end = text.find("\n", start + DOCUMENT)
        end = len(text) if end < 0 else end + 1
        parts.append(text[start:end])
        start = end
    return parts * copies


def write_jsonl(path: Path, texts: list[str]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)


def gpt2():
    from classiclm.data.tokenizers import load_tokenizer

    return load_tokenizer("gpt2")


def _encode_share(texts: list[str], library: bool, start, results) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = gpt2()
    if library:
        tokenizer.__dict__["ranked"] = None
    tokenizer.encode_documents(texts[:10])
    start.wait()
    began = time.monotonic()
    for text in texts:
        tokenizer.encode_documents([text])
    results.put((began, time.monotonic()))


def time_encoder(texts: list[str], workers: int, library: bool) -> float:
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(workers), context.Queue()
    shares = [texts[i::workers] for i in range(workers)]
    children = [context.Process(target=_encode_share, args=(share, library, start, results)) for share in shares]
    for child in children:
        child.start()
    spans = [results.get() for _ in children]
    for child in children:
        child.join()
    return max(end for _, end in spans) - min(began for began, _ in spans)


def time_ours(jsonl: Path, scratch: Path, workers: int, library: bool) -> float:
    out = scratch / "ours"
    shutil.rmtree(out, ignore_errors=True)
    began = time.monotonic()
    subprocess.run(command(jsonl, out, workers), check=True, env=environment(scratch, library), capture_output=True)
    return time.monotonic() - began


def command(jsonl: Path, out: Path, workers: int) -> list[str]:
    return [sys.executable, "-m", "classiclm", "prepare", str(jsonl), "--out", str(out), "--workers", str(workers)]


def environment(scratch: Path, library: bool) -> dict[str, str]:
    """With `library`, a module that refuses to be imported stands before tiktoken."""
    paths = [str(SOURCE)]
    if library:
        hidden = scratch / "hidden"
        hidden.mkdir(exist_ok=True)
        (hidden / "tiktoken.py").write_text("raise ImportError\n")
        paths.insert(0, str(hidden))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def _by_tiktoken(row):
    ids = _encoder().encode(row["text"])
    ids.append(50256)
    return {"ids": ids, "len": len(ids)}


def _by_library(rows):
    encoded = _encoder().encode_batch_fast(rows["text"], add_special_tokens=False)
    ids = [[*part.ids, 50256] for part in encoded]
    return {"ids": ids, "len": [len(part) for part in ids]}


_made: dict[str, object] = {}


def _encoder():
    if "encoder" not in _made:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        tokenizer = gpt2()
        _made["encoder"] = tokenizer._tokenizer if _made.get("library") else tokenizer.ranked
    return _made["encoder"]


def time_map(dataset, scratch: Path, workers: int, library: bool) -> float:
    """datasets.map, then the ids into one file in 1,024 batches, as nanoGPT's data/openwebtext/prepare.py does."""
    import datasets

    datasets.disable_progress_bars()
    _made.clear()
    _made["library"] = library
    cache = scratch / "map.arrow"
    for old in scratch.glob("map*.arrow"):
        old.unlink()
    began = time.monotonic()
    function = _by_library if library else _by_tiktoken
    done = dataset.map(
        function,
        batched=library,
        num_proc=workers,
        remove_columns=["text"],
        cache_file_name=str(cache),
        load_from_cache_file=False,
        new_fingerprint=f"bench{time.time_ns()}",
    )
    total = int(np.sum(done["len"], dtype=np.uint64))
    tokens = np.memmap(scratch / "map.bin", dtype=np.uint16, mode="w+", shape=(total,))
    place, n_batches = 0, min(1024, len(done))
    for i in range(n_batches):
        shard = done.shard(num_shards=n_batches, index=i, contiguous=True).with_format("numpy")
        batch = np.concatenate(shard["ids"])
        tokens[place : place + len(batch)] = batch
        place += len(batch)
    tokens.flush()
    return time.monotonic() - began


def tree_memory(root: int) -> int:
    """Bytes that a process and all its descendants hold for themselves (proportional set size)."""
    total, waiting = 0, [root]
    while waiting:
        pid = waiting.pop()
        try:
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) << 10
            for task in Path(f"/proc/{pid}/task").iterdir():
                waiting += [int(child) for child in (task / "children").read_text().split()]
        except OSError:  # it ended meanwhile
            continue
    return total


def peak_memory(jsonl: Path, scratch: Path, workers: int, *flags: str) -> tuple[float, float]:
    """Peak MB of the tree while ours runs, and its seconds."""
    out = scratch / "ours"
    shutil.rmtree(out, ignore_errors=True)
    began = time.monotonic()
    child = subprocess.Popen(
        [*command(jsonl, out, workers), *flags], env=environment(scratch, False), stderr=subprocess.DEVNULL
    )
    peak = 0
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.05):
            peak = max(peak, tree_memory(child.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = child.wait()
    done.set()
    watcher.join()
    assert code == 0
    return peak / 1e6, time.monotonic() - began


def compare(data: Path, copies: int, repeats: int, workers: int, scratch: Path, chosen: list[str]) -> None:
    from datasets import Dataset

    for name, file in FILES.items():
        texts = texts_of((data / file).read_text(encoding="utf-8"), copies)
        mb = sum(len(text.encode()) for text in texts) / 1e6
        jsonl = scratch / f"{name}.jsonl"
        write_jsonl(jsonl, texts)
        dataset = Dataset.from_dict({"text": texts})
        dataset.save_to_disk(str(scratch / f"{name}-arrow"))
        dataset = Dataset.load_from_disk(str(scratch / f"{name}-arrow"))
        ways = {
            "encoder": lambda: time_encoder(texts, workers, False),  # noqa: B023
            "ours": lambda: time_ours(jsonl, scratch, workers, False),  # noqa: B023
            "map+tiktoken": lambda: time_map(dataset, scratch, workers, False),  # noqa: B023
            "ours+library": lambda: time_ours(jsonl, scratch, workers, True),  # noqa: B023
            "map+library": lambda: time_map(dataset, scratch, workers, True),  # noqa: B023
        }
        seconds: dict[str, list[float]] = {way: [] for way in chosen}
        for _ in range(repeats):
            for way in chosen:
                seconds[way].append(ways[way]())
        report(name, mb, {way: statistics.median(times) for way, times in seconds.items()}, seconds)


def report(name: str, mb: float, medians: dict[str, float], seconds: dict[str, list[float]]) -> None:
    print(f"\n{name}: {mb:.0f} MB")
    for way, median in medians.items():
        spread = f"{mb / max(seconds[way]):.1f}-{mb / min(seconds[way]):.1f}"
        print(f"  {way:13} {mb / median:7.1f} MB/s  ({spread})")
    for ours, peer in (("ours", "map+tiktoken"), ("ours", "encoder"), ("ours+library", "map+library")):
        if {ours, peer} <= medians.keys():
            print(f"  {ours} / {peer}: {medians[peer] / medians[ours]:.2f} times as fast")


def main(argv: Sequence[str] | None = None) -> None:
    """Compare, or with --memory measure the peak of ours."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks prepare", description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("CLASSICLM_DATA", ".")))
    parser.add_argument("--copies", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--memory", type=int, nargs="+", help="MB of text")
    parser.add_argument("--cleaning", default="none", help="with --memory: the steps")
    flags = parser.parse_args(argv)
    sys.path.insert(0, str(SOURCE))
    os.environ["CLASSICLM_DATA"] = str(flags.data)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        if not flags.memory:
            compare(flags.data, flags.copies, flags.repeats, flags.workers, scratch, flags.ways)
            return
        for mb in flags.memory:
            text = (flags.data / FILES["shakespeare"]).read_text(encoding="utf-8")
            copies = max(1, round(mb * 1e6 / len(text)))
            jsonl = scratch / "text.jsonl"
            with jsonl.open("w", encoding="utf-8") as file:
                for i in range(copies):  # the number makes copies differ, so that no step takes them for duplicates
                    rows = (json.dumps({"text": f"{i} {part}"}) + "\n" for part in texts_of(text, 1))
                    file.writelines(rows)
            peak, seconds = peak_memory(jsonl, scratch, flags.workers, "--cleaning", flags.cleaning)
            print(f"{jsonl.stat().st_size / 1e6:.0f} MB: peak {peak:.0f} MB, {seconds:.0f} s")


if __name__ == "__main__":
    main()
