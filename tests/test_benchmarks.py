"""The benchmarks run, and refuse what they must; nothing here is about how fast anything is."""

import dataclasses
import functools
import gc
import importlib
import json
import sys
import time
import weakref
from pathlib import Path
from unittest import mock

import consolidated
import pytest
import torch

from cramlab.config import overridden
from cramlab.mixer import Routing

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def accelerator():
    return importlib.import_module("benchmarks.accelerator")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_routed_parity_holds_and_notices_when_it_does_not(accelerator, dtype, monkeypatch):
    where = accelerator.rows.Where(torch.device("cpu"), dtype)
    assert accelerator.routed_parity(where, 40)["holds"]
    read = accelerator.rows.EpisodicMemory.read
    monkeypatch.setattr(
        accelerator.rows.EpisodicMemory,
        "read",
        lambda self, h, readers, written: read(self, h, readers, written) * (1.0 if readers.mask.all() else 1.1),
    )
    assert not accelerator.routed_parity(where, 40)["holds"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_parity_holds_and_notices_when_one_way_is_off(accelerator, dtype, monkeypatch):
    where = accelerator.rows.Where(torch.device("cpu"), dtype)
    found = accelerator.steps_parity(where, 40)
    assert found["holds"]
    assert len(found["differences"]) == 3
    assert found["left_out"] < 0.2
    step = accelerator.GraphDecoder.step
    monkeypatch.setattr(accelerator.GraphDecoder, "step", lambda *given: step(*given) * 1.1)
    found = accelerator.steps_parity(where, 40)
    off = [name for name, size in found["differences"].items() if size > found["tolerance"]]
    assert [name.partition(",")[0] for name in off] == ["GraphDecoder"]
    assert not found["holds"]


def test_a_recorded_graph_keeps_what_it_reads(accelerator, monkeypatch):
    """A graph knows memory by its address: freed, it would be anybody's. CUDA is a stand-in here."""
    timing = sys.modules["benchmarks.timing"]
    monkeypatch.setattr(timing.torch, "cuda", mock.MagicMock())
    read = torch.zeros(3)
    alive, replay = weakref.ref(read), timing.graphed(functools.partial(torch.sum, read))
    del read
    gc.collect()
    assert alive() is not None
    replay()
    timing.torch.cuda.CUDAGraph().replay.assert_called_once_with()
    del replay
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("training", [False, True])
def test_bounds_of_the_benchmark_cut_nothing_off(accelerator, training):
    """A training step draws who is written besides."""
    rows = accelerator.rows
    x = torch.randn(2, 1000, rows.D)
    block = rows.cram_block(x).train(training)
    for asked in (Routing(), Routing(audits=torch.rand(2, 1000) < 0.1)):
        routing = rows.bounded(block, x, asked)
        seeded = [r._replace(generator=torch.Generator().manual_seed(3)) for r in (asked, routing)]
        (y, free), (y_bounded, bounded) = (rows.forward(block, x, r) for r in seeded)
        assert torch.allclose(y, y_bounded, atol=1e-5)
        assert torch.equal(free.trace.scored, bounded.trace.scored)
        assert torch.equal(free.trace.written, bounded.trace.written)


def test_bounds_that_another_draw_would_come_to_are_refused(accelerator, monkeypatch):
    rows = accelerator.rows
    x = torch.randn(1, 100, rows.D)
    block, counts = rows.cram_block(x), iter([3, 3, 90, 90, 90, 90])
    monkeypatch.setattr(rows, "_most", lambda _: next(counts))
    with pytest.raises(ValueError, match="too narrow"):
        rows.bounded(block, x)


def test_steps_for_a_graph_do_what_plain_steps_do(accelerator):
    transformers = pytest.importorskip("transformers")
    rows, context = accelerator.rows, 9
    sizes = transformers.LlamaConfig(
        hidden_size=rows.D, intermediate_size=rows.D, num_hidden_layers=2, num_attention_heads=rows.N_HEADS,
        vocab_size=8,
    )  # fmt: skip
    llama, x = transformers.LlamaModel(sizes).eval(), torch.randn(1, 64, rows.D)
    blocks = [rows.cram_block(x, read_frac=0.5, capacity=12) for _ in range(2)]
    with torch.no_grad():
        states = [block.mixer(block.mixer_input(x), torch.ones(1, 64)).state for block in blocks]
        token = x[:, 0].clone()
        steps = rows.steps_in_place(llama, blocks, states, token, context)
        held = rows.cache_in_place(llama, token, context)
        cache = transformers.DynamicCache(config=llama.config)
        for i, layer in enumerate(held.layers):
            cache.update(layer.keys[:, :, :-1], layer.values[:, :, :-1], i)
        for _ in range(2):  # the same step at the same context, again and again
            in_place = llama(inputs_embeds=token[:, None], past_key_values=held).last_hidden_state
        assert torch.allclose(in_place, llama(inputs_embeds=token[:, None], past_key_values=cache)[0], atol=1e-5)
        decoders = [rows.Decoder(block.mixer, state) for block, state in zip(blocks, states, strict=True)]
        expected = [rows.cram_token(blocks, decoders, now, torch.ones(1)) for now in x[:, :20].unbind(1)]
        found = []
        rows.replayed(lambda: found.append(steps["cram"]()), token, x[:, :20])
        assert torch.allclose(torch.stack(found), torch.stack(expected), atol=1e-5)
        assert torch.equal(steps["llama, in place"](), steps["llama, in place"]())


def test_what_cannot_be_recorded_is_left_out_and_says_why(accelerator, monkeypatch):
    from benchmarks import timing

    def graphed(work):
        if work == "waits":
            raise RuntimeError("operation not permitted when stream is capturing")
        return work

    monkeypatch.setattr(timing, "graphed", graphed)
    graphs, failed = timing.as_graphs({"a": "waits", "b": "goes"})
    assert graphs == {"b, as a graph": "goes"}
    assert "capturing" in failed["failed_ways"]["a, as a graph"]


def test_every_measurement_is_made_once_and_kept(accelerator, tmp_path, monkeypatch):
    monkeypatch.setattr(accelerator, "compiled", lambda *_: {"ways": {}})  # takes half a minute to compile
    monkeypatch.setattr(accelerator, "SHARES", (0.1, 1.0))
    monkeypatch.setattr(accelerator.rows, "repeats_at", lambda *_: 1)
    monkeypatch.setattr(sys, "argv", ["accelerator.py", "--device", "cpu", "--longest", "32", "--out", str(tmp_path)])
    monkeypatch.setattr(accelerator.rows.decode.__wrapped__, "__defaults__", (1, 1, accelerator.rows.CPU))
    assert accelerator.main() == 0
    made = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert {"ceilings.json", "decode-32.json", "steps-bfloat16.json", "scores-32-0.1.json"} <= set(made)
    assert accelerator.main() == 0
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == made
    page = accelerator.accelerator_page.section(tmp_path)
    assert "a dry run" in page
    assert "Dense attention is PyTorch's FLASH_ATTENTION." in page
    assert "| episodic tier with projections | 32 | 8 |" in page
    (tmp_path / "tier-32-by-1.json").unlink()
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--minutes", "0"])
    assert accelerator.main() == 3
    assert not (tmp_path / "tier-32-by-1.json").exists()


def test_a_measurement_that_fails_or_never_ends_says_so(accelerator, tmp_path, monkeypatch):
    found = accelerator.measured(lambda: {}["nothing"])
    assert found["failed"].startswith("KeyError in test_benchmarks.py")
    assert "longer than 1 s" in accelerator.measured(lambda: time.sleep(30), 1)["failed"]


def test_only_what_a_red_check_covers_is_not_timed(accelerator, tmp_path, monkeypatch):
    nothing = {"differences": {"steps": float("nan"), "calls": 0.0}, "tolerance": 1e-2, "holds": False}
    monkeypatch.setattr(accelerator, "steps_parity", lambda *_: nothing)
    monkeypatch.setattr(accelerator.rows, "repeats_at", lambda *_: 1)
    only = [part for name in ("tier", "decode", "attention") for part in ("--only", name)]
    arguments = ["accelerator.py", "--device", "cpu", "--longest", "32", "--out", str(tmp_path), *only]
    monkeypatch.setattr(sys, "argv", arguments)
    assert accelerator.main() == 4
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    assert found["decode-32"]["failed"] == "not timed, as steps-bfloat16 does not hold"
    assert "ways" in found["tier-32-by-1"]
    assert "ways" in found["attention-32"]
    page = accelerator.accelerator_page.section(tmp_path)
    assert "| steps-bfloat16 | inf (steps) | 1e-02 | no |" in page
    assert "- `decode-32`: not timed" in page


def test_a_failure_costs_one_measurement(accelerator, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(accelerator.rows, "tier", fails)
    monkeypatch.setattr(accelerator.rows, "repeats_at", lambda *_: 1)
    arguments = ["accelerator.py", "--device", "cpu", "--longest", "32", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*arguments, "--only", "tier-32-by-1", "--only", "forward-32-by-1"])
    assert accelerator.main() == 0
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    assert "CUDA out of memory" in found["tier-32-by-1"]["failed"]
    assert "ways" in found["forward-32-by-1"]


@pytest.mark.parametrize("training", [False, True])
def test_what_does_not_compile_costs_the_others_nothing(accelerator, monkeypatch, training):
    def compiled(go, fullgraph):
        def stops(block, x, routing):
            if fullgraph:
                raise NotImplementedError("data-dependent")
            return go(block, x, routing)

        return stops

    monkeypatch.setattr(torch, "compile", compiled)
    found = accelerator.compiled(accelerator.rows.CPU, 32, 2, training=training)
    works = ["transformer", "cram, bounded"] if training else ["transformer", "cram", "cram, bounded"]
    assert list(found["ways"]) == [*works, *(f"{name}, compiled" for name in works[:-1])]
    assert "data-dependent" in found["failed_ways"]["cram, bounded, compiled"]


def test_goals_are_judged_by_what_was_measured(accelerator):
    def way(ms):
        spread = {"p10": ms, "median": ms, "p90": ms}
        return {"ms": spread, "speedup": spread}

    record = {"what": "tier", "n_tokens": 16384, "least": {"routed": {"flops": 1e9, "bytes": 1e6}}}
    ways = {"dense": way(1.0), "routed": way(0.5), "dense, as a graph": way(0.9), "routed, as a graph": way(0.03)}
    found = {"tier-16384-by-1": record | {"ways": ways}, "training-16384-by-8": {"failed": "out of memory"}}
    found["ceilings"] = {"product_flops_per_s": 1e14, "copy_bytes_per_s": 1e12}
    for n, ms in ((1024, 30.0), (65536, 33.0)):
        ways = {"llama": way(60.0), "cram": way(ms), "llama, in place, as a graph": way(6.0)}
        found[f"decode-{n}"] = {"what": "decode", "n_tokens": n, "n_steps": 30, "ways": ways}
    goals = {what: rest for what, *rest in accelerator.accelerator_page.goals(found)}
    _, reached, binds = goals["episodic tier, 1.6% read, 16,384 tokens, batch 1"]
    assert reached == "30.0x (launch by launch 2.0x)"  # against the faster of the dense ways
    assert "launches" in binds
    assert "0.010 of 0.030 ms" in binds
    assert goals["layer, training step, 16,384 tokens, batch 8"] == ["3x", "not measured", "out of memory"]
    assert "1.10 times as long" in goals["decode, a token, four layers"][1]
    assert "the Llama's best way takes 0.200, 0.200 ms" in goals["decode, a token, four layers"][2]
    assert goals["decode, a token, four layers, as a graph"][1] == "not measured"


@pytest.fixture
def execution(accelerator, monkeypatch, tmp_path):
    execution = importlib.import_module("benchmarks.execution")

    monkeypatch.setattr(execution.rows, "repeats_at", lambda *_: 1)
    monkeypatch.setattr(execution, "LENGTHS", [32, 64])
    monkeypatch.setattr(execution, "parity", lambda *_: {"differences": {}, "holds": True})
    monkeypatch.setattr(sys, "argv", ["execution.py", "tier", "scan", "--out", str(tmp_path / "found.json")])
    return execution


def test_a_run_that_was_cut_off_goes_on_where_it_was(execution, tmp_path, monkeypatch):
    made, tier = [], execution.ROWS["tier"]

    def cut(n):
        made.append(n)
        if made == [32, 64]:
            raise KeyboardInterrupt
        return tier(n)

    monkeypatch.setitem(execution.ROWS, "tier", cut)
    with pytest.raises(KeyboardInterrupt):
        execution.main()
    assert execution.main() == 0
    assert made == [32, 64, 64]
    found = json.loads((tmp_path / "found.json").read_text())
    assert [(row["row"], row["n_tokens"]) for row in found["rows"]] == [
        ("tier", 32), ("tier", 64), ("scan", 32), ("scan", 64)
    ]  # fmt: skip
    execution.main()  # a finished one is made anew
    assert made == [32, 64, 64, 32, 64]


def test_nothing_is_timed_out_of_time_or_without_parity(execution, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--minutes", "0"])
    assert execution.main() == 3
    monkeypatch.setattr(execution, "parity", lambda *_: {"differences": {"a": 1.0}, "holds": False})
    assert execution.main() == 1
    assert not (tmp_path / "found.json").exists()


@pytest.mark.parametrize("broken", [False, True])
def test_the_delta_rule_is_timed_only_while_it_equals_its_definition(broken, tmp_path, monkeypatch, capsys):
    module = importlib.import_module("benchmarks.delta_rule")
    if broken:
        rule = module.delta_rule
        monkeypatch.setattr(module, "delta_rule", lambda *given: (1.001 * rule(*given)[0], rule(*given)[1]))
    given = ["--device", "cpu", "--sizes", "1x70x2", "--d-head", "8", "--repeats", "1", "--out", str(tmp_path / "out")]
    assert module.main(given) == broken
    assert (tmp_path / "out").exists() == (not broken)
    if broken:
        assert "parity is broken" in capsys.readouterr().err
    else:
        rows = json.loads((tmp_path / "out").read_text())["rows"]
        assert [row["backward"] for row in rows] == [False, True]
        assert all(set(row["ways"]) == {"reference", "attention"} for row in rows)


def test_serving_times_every_level_once_and_all_open_gates_give_the_original(tmp_path, capsys):
    serving = importlib.import_module("benchmarks.serving")
    rows = ["kernel-tiny-200-b3", "step-tiny-150-b2"]
    given = ["--out", str(tmp_path), "--repeats", "1", "--read-frac", "0.3", "--device", "cpu", "--rows"]
    assert serving.main([*given, *rows, "step-smollm2-8192-b8"]) == 0
    assert "step-smollm2-8192-b8: wants --folder" in capsys.readouterr().out
    kernel, step = (json.loads((tmp_path / f"{row}.json").read_text()) for row in rows)
    assert set(kernel["ways"]) == {"full, split-K kernel", "full, PyTorch's attention", "gated", "near alone"}
    assert kernel["difference_all_open"] < 1e-5
    assert kernel["read_frac"] == pytest.approx(0.3)
    assert kernel["bytes_gated"] < kernel["bytes_full"] == 2 * 2 * 16 * 4 * 200 * 3
    assert {"gated", "gates open", "window everywhere", "original, DynamicCache, eager"} <= set(step["ways"])
    assert max(step["differences"].values()) < 1e-3
    assert 0.5 < step["skipped_frac"] < 0.9
    assert sum(step["shares"]) == pytest.approx(0.9)
    made = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert serving.main([*given, *rows, "step-tiny-150-b1", "--seconds", "-1"]) == 0
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == made
    with pytest.raises(SystemExit, match="row 'tiny-b2' is not known"):
        serving.main([*given, "tiny-b2"])


def test_serving_answers_from_a_text_with_the_gates_of_a_folder(tmp_path):
    serving = importlib.import_module("benchmarks.serving")
    consolidated.make(tmp_path / "folder")
    text = tmp_path / "text.txt"
    text.write_text(consolidated.TEXT)
    given = [
        "--out",
        str(tmp_path / "out"),
        "--folder",
        str(tmp_path / "folder"),
        "--text",
        str(text),
        "--device",
        "cpu",
    ]
    assert (
        serving.main(
            [*given, "--repeats", "1", "--tokens", "4", "--rows", "answer-glassllm-40-b1", "step-glassllm-40-b1"]
        )
        == 0
    )
    record = json.loads((tmp_path / "out" / "answer-glassllm-40-b1.json").read_text())
    assert set(record["ways"]) > {"original, DynamicCache", "gated"}
    assert 0 < record["skipped_frac"] < 1
    step = json.loads((tmp_path / "out" / "step-glassllm-40-b1.json").read_text())
    assert 0 < step["skipped_frac"] < 1
    assert step["shares"] is None
    models = serving.Models(mock.Mock(out=tmp_path / "out"))
    assert models._shares() == [1 - share for share in record["skipped_frac_by_layer"].values()]


SMALL = ["vocab_size=128", "d_model=32", "n_heads=2", "n_layers=8", "precision=32", "compile=false"]


@pytest.mark.parametrize("arm", ["llama", "cram-12"])
def test_decoding_goes_on_from_its_context_at_its_share_of_reads(arm):
    decode = importlib.import_module("benchmarks.language_decode")
    base = overridden(dataclasses.replace(decode.BASE, device="cpu", context=96), SMALL)
    config = dataclasses.replace(base, arm=arm, **decode.ARMS[arm])
    tokens = torch.randint(128, (1, 64), generator=torch.Generator().manual_seed(0))
    model = decode.prepared(config, tokens)
    if arm == "cram-12":
        gates = model(input_ids=tokens, use_cache=False, output_gates=True).gate_margins
        reads = sum(float((margins > 0).float().mean()) for margins in gates) / config.n_layers
        assert reads == pytest.approx(config.reads_frac, abs=0.03)
    call = decode.decoding(model, tokens, 3)
    seen = []
    model.register_forward_hook(lambda *given, **_: seen.append(given[-1].logits[:, -1:].argmax(-1)))
    call()
    call()
    generated = torch.cat([tokens[:, -1:], *seen], dim=1)
    logits = model(input_ids=torch.cat([tokens, generated[:, :-1]], dim=1), use_cache=False).logits
    assert torch.equal(logits[:, 64:].argmax(-1), generated[:, 1:])  # one pass over all tokens decodes the same


def test_growth_is_over_the_shortest_context(tmp_path, capsys):
    decode = importlib.import_module("benchmarks.language_decode")
    sizes = [word for field in SMALL for word in ("--set", field)]
    command = ["--arms", "llama", "layer-7", "--contexts", "64", "32", "--tokens", "2", "--repeats", "2", *sizes]
    assert decode.main([*command, "--device", "cpu", "--out", str(tmp_path / "decode.json")]) == 0
    rows = json.loads((tmp_path / "decode.json").read_text())["rows"]
    assert [(row["arm"], row["context"]) for row in rows] == [
        ("llama", 32), ("layer-7", 32), ("llama", 64), ("layer-7", 64),
    ]  # fmt: skip
    for first, last in zip(rows[:2], rows[2:], strict=True):
        assert first["growth"] == 1
        assert last["growth"] == last["ms_per_token"]["median"] / first["ms_per_token"]["median"]
