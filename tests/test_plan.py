"""Plans: reading compiled programs, compiling for CPUs and TPUs, arithmetic, the search."""

import importlib.util
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax import UserError, schema
from mim_jax.data.described import open_described
from mim_jax.plan import cache, hardware, memory
from mim_jax.plan.__main__ import main
from mim_jax.plan.compiled import (
    Collective,
    Instruction,
    collectives,
    collectives_of,
    instructions,
    unknown_loops,
)
from mim_jax.plan.cost import SHARE, cost_of, seconds_of_collective, work_of
from mim_jax.plan.hardware import GIB, TPUS, Target, target_of
from mim_jax.plan.kernels import Kernel, kernel_of
from mim_jax.plan.search import candidates, search
from mim_jax.plan.step import Step, load, needed

SMALL = ["model.width=16", "model.depth=1", "model.heads=2", "objective.decoder_width=16"]
SMALL += ["objective.decoder_depth=1", "objective.decoder_heads=2", "data.size=16"]

PROGRAM = """
%all-reduce-scatter.1 (input: f32[64,32]) -> f32[8,32] {
  %pad = f32[64,32]{1,0} pad(%input), padding=0_0
  %all-reduce.7 = f32[64,32]{1,0:T(8,128)} all-reduce(%pad), replica_groups={{0,1,2,3,4,5,6,7}}
  ROOT %slice = f32[8,32]{1,0} dynamic-slice(%all-reduce.7, %i)
}

%fused_computation.3 (param_0: bf16[8,32]) -> bf16[64,32] {
  ROOT %all-gather.1 = bf16[64,32]{1,0:T(8,128)(2,1)} all-gather(%param_0), dimensions={0}, frontend_attributes={chain_id="4"}
}

%async_collective_fusion.9 (param_0: bf16[8,32]) -> bf16[64,32] {
  ROOT %all-gather.2 = bf16[64,32]{1,0:T(8,128)(2,1)} all-gather(%param_0), dimensions={0}, frontend_attributes={chain_id="4"}
}

ENTRY %main (a: f32[8,32], b: bf16[8,16]) -> f32[] {
  %all-gather.3 = bf16[64,16]{1,0} all-gather(%b), dimensions={0}, frontend_attributes={chain_id="5"}
  %start = (f32[1,32]{1,0}, f32[8,32]{1,0}) all-gather-start(%c), dimensions={0}
  %done = f32[8,32]{1,0} all-gather-done(%start)
  %rs = f32[4,8]{1,0} reduce-scatter(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %rs2 = f32[4,8]{1,0} reduce-scatter(%x), replica_groups=[4,2]<=[8], dimensions={0}
  %rs3 = f32[4,8]{1,0} reduce-scatter(%x), replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}, dimensions={0}
  %flag = pred[] all-reduce(%p), to_apply=%and
  %r = bf16[4]{0} ragged-all-to-all(%q)
  ROOT %sum = (f32[], f32[16]{0}, /*index=2*/f32[3]{0}) all-reduce(%l, %m, %n), to_apply=%add
}
"""  # noqa: E501


def test_whole_arrays_are_counted_once():
    assert collectives(PROGRAM) == {
        "all-gather bf16": (2, 2 * (64 * 32 + 64 * 16)),
        "all-gather f32": (1, 4 * 8 * 32),
        "all-reduce pred": (1, 1),
        "ragged-all-to-all bf16": (1, 2 * 4),
        "all-reduce f32": (3, 4 * (1 + 16 + 3)),
        "reduce-scatter f32": (4, 4 * (64 * 32 + 4 * 4 * 8 + 2 * 4 * 8 + 4 * 4 * 8)),
    }


# A loop that runs five times, a kernel, and a fusion in the chip's own memory.
TIMED = """
%body (p: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %gte = bf16[8,128]{1,0} get-tuple-element(%p), index=1
  %fusion.1 = bf16[8,128]{1,0} fusion(%gte), kind=kLoop, calls=%f, metadata={op_name="jit(f)/encoder/block_0/fc1/dot"}, backend_config={"estimated_cycles":"300"}
  %all-reduce.1 = f32[16]{0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%add
  ROOT %tuple = (s32[], bf16[8,128]{1,0}) tuple(%i, %fusion.1)
}

%counts (p: (s32[], bf16[8,128])) -> pred[] {
  %five = s32[]{:T(128)} constant(5)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %less = pred[]{:T(512)} compare(%i, %five), direction=LT
}

%fills (p: (s32[], bf16[8,128])) -> pred[] {
  %many = s32[] constant(75)
  %masked = s32[] fusion(%p), kind=kLoop, calls=%g
  ROOT %lacks = pred[]{:T(512)} compare(%masked, %many), direction=LT
}

ENTRY %main (a: bf16[8,128]) -> bf16[8,128] {
  %qkv = bf16[4,50,96]{2,1,0:T(8,128)} parameter(0)
  %kernel = (bf16[4,49,32]{2,1,0}, f32[4,2,49]{2,1,0:S(1)}) custom-call(%qkv), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/decoder/attention"}
  %while = (s32[], bf16[8,128]{1,0}) while(%init), condition=%c, body=%body, LENGTH
  %other = (s32[], bf16[8,128]{1,0}) while(%init), condition=%fills, body=%d, metadata={op_name="jit(f)/draw"}
  ROOT %r = bf16[8,128]{1,0} copy(%g), backend_config={"estimated_cycles":"40"}
}
"""  # noqa: E501


@pytest.mark.parametrize(
    "length", ['backend_config={"known_trip_count":{"n":"5"}}', "condition=%counts"]
)
def test_operations_count_as_often_as_they_run(length):
    """The length of a loop is noted, or its condition counts; other conditions do not."""
    text = TIMED.replace("condition=%c,", "").replace("LENGTH", length)
    program = instructions(text)
    cycles = {name: row.times * row.cycles for name, row in program.items() if row.cycles}
    assert cycles == {"%fusion.1": 5 * 300, "%r": 40}
    assert unknown_loops(text) == ["jit(f)/draw"]
    assert collectives(text) == {"all-reduce f32": (5, 5 * 16 * 4)}
    kernel = kernel_of(program["%kernel"], program)
    assert kernel == Kernel(False, images=4, tokens=50, heads=2, width=16, last=49, biased=False)


def test_the_usual_branch_of_a_conditional_counts():
    def choose(rare, x):
        return jax.lax.cond(rare, lambda x: x @ x, jnp.sin, x)

    text = jax.jit(choose).lower(True, jnp.ones((64, 64))).compile().as_text()
    sources = [row.source for row in instructions(text).values()]
    assert any("sin" in source for source in sources)
    assert not any("dot_general" in source for source in sources)


@pytest.mark.parametrize(
    ("source", "work"),
    [
        ("jit(step)/jvp(BEiT)/encoder/block_0/fc1/dot_general", ("encoder", "MLP")),
        ("jit(step)/transpose(jvp(DalleDecoder))/group_1/conv", ("tokenizer", "other")),
        ("jit(step)/jvp(SmallEncoder)/conv", ("tokenizer", "other")),
        ("jit(step)/mul", ("rest", "optimizer")),
    ],
)
def test_work_is_classified_by_the_names_of_an_operation(source, work):
    line = f'%a = f32[8]{{0}} fusion(%b), metadata={{op_name="{source}"}}'
    assert work_of(Instruction("%a", "f32[8]", "fusion", [], line, 1)) == work


def test_collectives_that_run_beside_other_work():
    overlapping = {(row.kind, row.bytes) for row in collectives_of(PROGRAM) if row.overlaps}
    assert overlapping == {("all-gather", 4096), ("all-gather", 2048), ("all-gather", 1024)}


def test_time_of_collectives():
    """A ring sends (n - 1) / n of the array in two directions; an all-reduce does so twice."""
    chip = TPUS["v5e"]
    row = Collective("reduce-scatter", "f32", 90_000_000, 4, 3, False, 1)
    assert math.isclose(seconds_of_collective(row, chip), 3 * 0.75e-3)
    row = row._replace(kind="all-reduce", rings=2)
    assert math.isclose(seconds_of_collective(row, chip), 3 * 0.75e-3)


def test_the_memory_in_the_compiler_s_messages():
    assert needed("Ran out of memory in memory space hbm. Used 20.5G of 15.75G hbm.") == 20.5 * GIB
    text = "the total memory required for HLO temporaries (512.0M) exceeds available HBM (15.75G)"
    assert needed(text) == 512 * 2**20
    assert needed("INVALID_ARGUMENT: 3 of 4 shapes (8) are wrong") == 0


def test_arrays_that_exist_at_the_same_time():
    def program(x):  # (1000,) float32
        y = jnp.outer(x, x)  # 4 MB
        z = y @ y  # 8 MB with y
        return z.sum()

    jaxpr = jax.make_jaxpr(program)(np.zeros(1000, np.float32)).jaxpr
    assert 8e6 <= memory.peak(jaxpr) < 8.1e6


def plan(capsys, *arguments: str) -> tuple[int, list[str]]:
    code = main([*arguments, *(f"--config.{x}" for x in SMALL)])
    return code, capsys.readouterr().out.splitlines()


def test_a_plan_for_cpus(tmp_path, capsys):
    """Its figures are those of the compiled step, also when they are read a second time."""
    arguments = ["--config=mae_emoji", "--target=cpu:8", "--json", "--config.fsdp=8"]
    arguments += [f"--config.compile_cache={tmp_path}", "--config.accumulate=2"]
    code, lines = plan(capsys, *arguments)
    assert code == 0
    result = json.loads(lines[-1])
    assert (result["target"], result["devices"], result["fits"]) == ("cpu:8", 8, True)

    overrides = [*SMALL, "fsdp=8", "accumulate=2", "compile_cache="]
    step = Step(schema.load("mae_emoji", overrides), target_of("cpu:8"))
    compiled = step.traced.lower().compile()
    assert result["peak_hbm_bytes"] == compiled.memory_analysis().peak_memory_in_bytes
    assert result["flops"] == 2 * compiled.cost_analysis()["flops"]
    assert result["flops"] > result["model_flops"] > 0
    assert result["predicted_step_seconds"] is result["images_per_second_per_device"] is None
    moved = {kind: (x["count"], x["bytes"]) for kind, x in result["collectives"].items()}
    assert moved == {
        kind.removesuffix(" f32"): x for kind, x in collectives(compiled.as_text()).items()
    }
    for entry in result["collectives"].values():
        assert 0.8 < entry["theory_bytes"] / entry["bytes"] < 1.25

    assert list((tmp_path / "plan").iterdir())
    assert json.loads(plan(capsys, *arguments)[1][-1]) == result


def test_a_damaged_cache_is_not_used(tmp_path):
    file = cache.file_of(str(tmp_path), ["a"])
    cache.write(file, b"content")
    assert cache.read(file) == b"content"
    file.write_bytes(file.read_bytes()[:-4])
    assert cache.read(file) == cache.read(None) == b""


def test_a_plan_for_gpus(capsys):
    """By arithmetic, and in bfloat16: the time is that of the FLOPs at a share of the peak."""
    code, lines = plan(capsys, "--config=mae_emoji", "--target=h100:8", "--json")
    result = json.loads(lines[-1])
    assert code == 0
    assert result["how"] == "arithmetic"
    assert "by arithmetic" in "\n".join(lines)
    assert "computed in bfloat16" in "\n".join(lines)
    state = sum(result["memory_bytes"][name] for name in ("parameters", "optimizer"))
    assert state == 3 * 4 * result["parameters"] + 8  # and two counters
    assert result["peak_hbm_bytes"] > state + result["memory_bytes"]["batch"]
    assert math.isclose(result["computing_seconds"], result["model_flops"] / SHARE / 989e12)
    waiting = 2 * 7 / 8 * 4 * result["parameters"] / 900e9
    assert math.isclose(result["waiting_seconds"], waiting)
    rate = 4 / result["predicted_step_seconds"]
    assert math.isclose(result["images_per_second_per_device"], rate)


def test_a_table(capsys):
    _, lines = plan(
        capsys, "--config=mae_emoji", "--config=mae_emoji", "--target=h100:8", "--markdown"
    )
    assert len(lines) == 4
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| mae_emoji | h100:8 |  | yes |")


def small_step(*overrides: str, chip: hardware.Chip | None = None) -> Step:
    target = target_of("h100:8")
    config = load("mae_emoji", [*SMALL, "batch_size=64", *overrides], target)
    return Step(config, Target("test", chip or target.chip, target.devices, compiled=False))


def test_the_search_tries_the_cheapest_first():
    tried = list(candidates(small_step()))
    assert tried[:3] == [{"accumulate": count} for count in (2, 4, 8)]
    assert tried[3] == {"fsdp": 8}
    assert tried[7] == {"model.remat": "full"}
    assert tried[-1] == {"accumulate": 8, "fsdp": 8, "model.remat": "full"}


@pytest.mark.parametrize(
    ("limit", "keys"),
    [(0.6, {"accumulate": 2}), (0.3, {"accumulate": 4}), (0.001, None)],
)
def test_the_search_finds_what_fits(limit, keys):
    """Of a step whose memory is all activations; a part as large as the limit fits."""
    size, tried = 1e12, []
    chip = hardware.GPUS["h100"]._replace(memory=limit * size)
    first = cost_of(small_step(chip=chip))._replace(fits=False, peak=size)

    def measure(step):
        tried.append(step.config.accumulate)
        peak = size / step.config.accumulate
        return first._replace(step=step, peak=peak, fits=peak <= chip.memory)

    fitting = search(first, measure)
    assert (fitting and fitting.keys) == keys
    assert all(1 / count <= 1.25 * limit for count in tried)  # what is far too large is left out


def test_what_does_not_fit_is_reported(capsys, monkeypatch):
    size = 2_000_000
    monkeypatch.setitem(hardware.GPUS, "h100", hardware.GPUS["h100"]._replace(memory=size))
    arguments = ["--config=mae_emoji", "--target=h100:8", "--json", "--config.batch_size=4096"]
    code, lines = plan(capsys, *arguments)
    result = json.loads(lines[-1])
    assert code == 1
    assert not result["fits"]
    assert result["predicted_step_seconds"] is None
    suggestion = result["suggestion"]
    assert suggestion["fits"]
    assert suggestion["peak_hbm_bytes"] <= size < result["peak_hbm_bytes"]
    keys = " ".join(f"--config.{key}={value}" for key, value in suggestion["keys"].items())
    assert f"it fits with {keys}" in lines


@pytest.mark.parametrize(("options", "searched"), [([], True), (["--no-search"], False)])
def test_nothing_is_said_of_a_search_that_was_not_made(capsys, monkeypatch, options, searched):
    monkeypatch.setitem(hardware.GPUS, "h100", hardware.GPUS["h100"]._replace(memory=1))
    code, lines = plan(capsys, "--config=mae_emoji", "--target=h100:8", *options)
    assert code == 1
    assert lines[-1].startswith("none of the combinations") == searched


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("v5x:4x4", "there is no such target"),
        ("v5e:16", "there is no such slice"),
        ("cpu:0", "there is no such target"),
        ("cpu:4096", "4096 devices are needed"),
    ],
)
def test_targets_that_do_not_exist(target, message):
    with pytest.raises(UserError, match=message):
        target_of(target)


def test_without_the_compiler_for_tpus(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'mim-jax\[tpu\]'"):
        target_of("v5e:4x4")


def test_data_that_are_known_by_their_sizes():
    config = load("ade20k_mae_base", [], target_of("cpu:8"))
    assert config.data.name == "sizes:20210/150"
    source, _ = open_described(config.data.name, ("train", "validation"), 3, segmented=True)
    assert (len(source.examples), len(source.classes.names)) == (20210, 150)
    with pytest.raises(UserError, match="mim-jax plan"):
        source.examples[0]
    with pytest.raises(UserError, match="sizes:IMAGES/CLASSES"):
        open_described("sizes:many", ("train",), 3, segmented=False)


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu")
def test_a_plan_for_tpus(tmp_path, command):
    """Kernels, collectives and all other operations have a time."""
    arguments = ["--config=mae_emoji", "--target=v5e:2x2", "--json", "--config.fsdp=4"]
    arguments += [f"--config.{key}" for key in SMALL] + [f"--config.compile_cache={tmp_path}"]
    done = command("mim_jax", "plan", *arguments)
    assert done.returncode == 0, done.stderr
    assert "compiling the step for v5e:2x2 ..." in done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["fits"]
    assert result["available_bytes"] == 15.75 * GIB
    assert 0 < result["kernel_seconds"] < result["computing_seconds"]
    assert result["waiting_seconds"] > 0
    assert {"all-gather", "reduce-scatter", "all-reduce"} <= set(result["collectives"])
    assert Path(tmp_path, "plan").is_dir()


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu")
@pytest.mark.parametrize(
    ("target", "count"), [("v5e:1x1", 1), ("v6e:2x4", 8), ("v4:1x1x1", 1), ("v5p:2x2x4", 16)]
)
def test_slices_smaller_and_larger_than_a_host(target, count):
    kind, _, size = target.partition(":")
    assert len(hardware.tpus(target, kind, size)) == count
