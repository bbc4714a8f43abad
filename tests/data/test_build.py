import itertools
import json
import os
import threading
import tracemalloc

import numpy as np
import pytest

from fastgpt.data import build, token_files
from fastgpt.data.build import _jobs, _State, _tokenize, ordered_map
from fastgpt.data.tokenizers import BPETokenizer, ByteTokenizer, CharTokenizer
from fastgpt.errors import UserError

from .conftest import TEXT


class Texts:
    """A source of documents given as (split, text)."""

    n_bytes = None
    identity = {"a": 1}

    def __init__(self, documents):
        self._documents = documents

    def documents(self):
        for split, text in self._documents:
            yield split, text.encode()
            yield split, None


def some_documents(n=60):
    return [
        ("val" if i % 7 == 3 else "train", f"{i} " + TEXT[i % 50 :] * (i % 4)) for i in range(n)
    ]


def run(folder, source, tokenizer, workers=1):
    state = _State(folder, {"of": 1})
    _tokenize(state, source, tokenizer, workers)
    return {s: [folder / f["file"] for f in shards] for s, shards in state.shards.items()}


def ids_of(paths):
    return np.concatenate([token_files.inspect(p).open()[:] for p in paths]).tolist()


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # hundreds of tiny files; no power cut here
    monkeypatch.setattr(build, "JOB_BYTES", 500)
    monkeypatch.setattr(token_files, "SHARD_TOKENS", 700)


def make(kind, ranks):
    if kind == "char":
        return CharTokenizer(sorted(set("0123456789" + TEXT)))
    return ByteTokenizer() if kind == "byte" else BPETokenizer("small", ranks)


@pytest.mark.parametrize("kind", ["byte", "char", "bpe"])
def test_files_hold_the_documents_tokens(tmp_path, small, ranks, kind):
    tok, documents = make(kind, ranks), some_documents()
    files = run(tmp_path / "p", Texts(documents), tok)
    for split, paths in files.items():
        want = []
        for where, text in documents:
            if where == split:
                want += tok.encode(text).tolist() + ([] if tok.eot is None else [tok.eot])
        assert ids_of(paths) == want
        counts = [token_files.inspect(p).count for p in paths]
        assert all(n == 700 for n in counts[:-1]) and 0 < counts[-1] <= 700
        assert len(counts) > 1


def test_workers_do_not_change_a_byte(tmp_path, small, ranks):
    tok, results = make("bpe", ranks), []
    for workers in (1, 2, 3, 8):
        files = run(tmp_path / str(workers), Texts(some_documents(150)), tok, workers)
        results.append([(p.name, p.read_bytes()) for paths in files.values() for p in paths])
    assert all(r == results[0] for r in results)


def test_a_document_of_many_pieces_ends_once(small):
    text = TEXT * 20
    jobs = list(_jobs(Texts([("train", text), ("val", "x")])))
    items = [item for job in jobs for item in job]
    texts = [text for _, text in items]
    assert len(texts) > 6 and b"".join(texts[:-3]).decode() == text
    assert None not in texts[:-3] and texts[-3:] == [None, b"x", None]


class Stop(Exception):
    pass


def test_going_on_after_any_interruption_gives_the_same_files(tmp_path, small, ranks, capsys):
    tok, documents = make("bpe", ranks), some_documents(150)
    want = {
        p.name: p.read_bytes()
        for paths in run(tmp_path / "whole", Texts(documents), tok).values()
        for p in paths
    }
    resumed = set()
    for n in range(0, 150, 9):
        folder = tmp_path / f"cut{n}"

        def broken(n=n):
            yield from documents[:n]
            raise Stop

        class Broken(Texts):
            def documents(self, broken=broken):
                for split, text in broken():
                    yield split, text.encode()
                    yield split, None

        with pytest.raises(Stop):
            run(folder, Broken([]), tok)
        capsys.readouterr()
        files = run(folder, Texts(documents), tok)
        resumed.add(capsys.readouterr().out)
        assert {p.name: p.read_bytes() for ps in files.values() for p in ps} == want
    assert len(resumed) > 5, "it did go on from several places"


def test_finished_shards_are_not_made_again(tmp_path, small, ranks, monkeypatch):
    tok, documents = make("bpe", ranks), some_documents(150)
    with pytest.raises(Stop):
        run(tmp_path / "p", Texts(itertools.chain(documents[:120], raising())), tok)
    encoded = []
    monkeypatch.setattr(
        BPETokenizer,
        "encode_bytes",
        lambda self, data: encoded.append(data) or self.encode(data.decode()),
    )
    run(tmp_path / "p", Texts(documents), tok)
    assert 30 <= len(encoded) < 100


def raising():
    raise Stop
    yield


def damage_shard(folder):
    path = sorted(folder.glob("tokens_train*"))[0]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "change",
    [
        damage_shard,
        lambda d: sorted(d.glob("tokens_train*"))[0].unlink(),
        lambda d: (d / "state.json").unlink(),
        lambda d: (d / "state.json").write_text("{"),
        lambda d: (d / "state.json").write_text("[]"),
        lambda d: (d / "stale.tmp").write_text("x"),
        lambda d: (d / "state.json").write_text(
            json.dumps({**json.loads((d / "state.json").read_text()), "purpose": "other"})
        ),
    ],
)
def test_leftovers_that_do_not_fit_are_made_again(tmp_path, small, change):
    tok, documents = ByteTokenizer(), some_documents(100)
    whole = run(tmp_path / "w", Texts(documents), tok)
    with pytest.raises(Stop):
        run(tmp_path / "p", Texts(itertools.chain(documents[:90], raising())), tok)
    change(tmp_path / "p")
    again = run(tmp_path / "p", Texts(documents), tok)
    for split, paths in whole.items():
        assert [p.read_bytes() for p in again[split]] == [p.read_bytes() for p in paths]
    names = {p.name for paths in again.values() for p in paths}
    assert set(os.listdir(tmp_path / "p")) - {"state.json"} == names


def test_memory_does_not_grow_with_the_corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(token_files, "SHARD_TOKENS", 4 << 20)
    line = "a line of text that repeats without end, or so it seems\n"

    def peak(n_documents):
        source = Texts(("train", line * 2000) for _ in range(n_documents))
        tracemalloc.start()
        run(tmp_path / str(n_documents), source, ByteTokenizer())
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak(200) < 1.2 * peak(20) < 24 << 20  # 22 MB against 2 MB of text


# --- ordered_map


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_ordered_map_keeps_the_order_and_few_in_work(threads):
    taken = []
    results = ordered_map(lambda x: x * x, (taken.append(i) or i for i in range(100)), threads)
    for n, value in enumerate(results):
        assert value == n * n and len(taken) - n <= 2 * threads + 1


def test_ordered_map_runs_in_parallel():
    barrier = threading.Barrier(3, timeout=20)
    assert list(ordered_map(lambda x: barrier.wait() >= 0, range(3), 3)) == [True] * 3


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("where", ["function", "items"])
def test_ordered_map_raises_the_first_error_and_ends(threads, where):
    def work(x):
        if where == "function" and x >= 5:
            raise Stop(x)
        return x

    def items():
        yield from range(5)
        if where == "items":
            raise Stop(5)
        yield from range(5, 10**6)

    done = []
    with pytest.raises(Stop, match="5"):
        for x in ordered_map(work, items(), threads):
            done.append(x)
    assert done == list(range(len(done))) and threading.active_count() < 10


def test_bpe_is_trained_on_evenly_spread_text(monkeypatch):
    source = Texts(("train", f"text {i}") for i in range(100))
    source.n_bytes = 100 * 7
    monkeypatch.setattr(build, "BPE_TRAIN_BYTES", 70)
    texts = list(build._training_texts(source, "bpe:300"))
    assert texts == [f"text {i}" for i in range(9, 100, 10)]


def test_an_error_leaves_nothing_behind_without_a_finished_shard(tmp_path, settings):
    from fastgpt.data.prepare import prepare

    path = tmp_path / "t.txt"
    path.write_text("a")
    with pytest.raises(UserError, match="too little text for a train split"):
        prepare(settings(input=str(path)))
    assert not list((tmp_path / "data").glob(".*.partial"))
