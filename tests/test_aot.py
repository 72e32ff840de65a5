import dataclasses
import importlib.util
import json
import math
import types

import jax
import jax.numpy as jnp
import pytest
import tiny_llama
from commands import QUICKSTART, command, refused

from configs import architectures, quickstart
from experiments import pods
from mgrpo_jax import objectives, optim
from mgrpo_jax.aot import chips, flops, hlo, programs, report
from mgrpo_jax.packing import BatchShape
from mgrpo_jax.policy import params
from mgrpo_jax.policy.config import Execution, Experts
from mgrpo_jax.policy.load import huggingface
from mgrpo_jax.policy.lora import LoRA

V5E = chips.parse("v5e-4")


@pytest.mark.parametrize(
    ("name", "topology", "accelerator", "slices"),
    [
        ("v5p-128", "v5p:4x4x4", "v5p-128", 1),
        ("2xv5p-128", "v5p:4x4x4", "v5p-128", 2),
        ("v4-32", "v4:2x2x4", "v4-32", 1),
        ("v4-8", "v4:2x2x1", "v4-8", 1),
        ("v5e-64", "v5e:8x8", "v5litepod-64", 1),
        ("v5e-16", "v5e:4x4", "v5litepod-16", 1),
        ("v5e-4", "v5e:2x2", "v5litepod-4", 1),
        ("v6e-64", "v6e:8x8", "v6e-64", 1),
    ],
)
def test_topologies_by_the_names_users_say(name, topology, accelerator, slices):
  parsed = chips.parse(name)
  description = parsed.description()
  assert parsed.name == name
  assert description["topology_name"] == topology
  assert description["num_slices"] == slices
  assert parsed.environment()["TPU_ACCELERATOR_TYPE"] == accelerator
  megacore = name.lstrip("2x")[:3] in ("v4-", "v5p")
  assert description["chip_config_name"] == (
      "megacore" if megacore else "default"
  )


@pytest.mark.parametrize(
    "name", ["v5e", "v9-8", "0xv5e-4", "v5e-5", "v5p-2", "v6e-512", "x", ""]
)
def test_a_wrong_topology_is_named(name):
  with pytest.raises(ValueError, match=f"topology {name!r}"):
    chips.parse(name)


def test_a_group_uses_two_links_of_every_axis_it_can_span():
  cube = chips.parse("v5p-128")  # 4 × 4 × 4
  # Eight chips may stand as 2 × 2 × 2.
  assert [cube.links(size) for size in (1, 2, 3, 4, 8, 16, 64)] == [
      *(2, 2, 2, 4, 6, 6, 6)
  ]
  assert V5E.links(16) == 4


def test_model_flops_of_a_llama_counted_by_hand():
  config = tiny_llama.config(
      vocab_size=10,
      embed_dim=4,
      num_layers=2,
      num_heads=2,
      num_kv_heads=1,
      head_dim=2,
      mlp_dim=6,
      tied_embeddings=False,
  )
  # q 4·4, k and v 4·2 each, out 4·4, three of 4·6, two norms of 4.
  layer = 16 + 8 + 8 + 16 + 3 * 24 + 8
  active = 2 * layer + 4 + 40  # final norm, unembedding; no embedding
  assert flops.active_params(config) == active
  pairs = 2 * (1 + 2 + 3)  # of two layers, three tokens
  expected = 6 * active * 3 * 5 + 12 * 2 * 2 * pairs * 5
  assert flops.training(config, rows=5, length=3, targets=3) == expected
  # Of two of three tokens no logits are needed.
  expected -= 6 * 40 * 2 * 5
  assert flops.training(config, rows=5, length=3, targets=1) == expected


def test_a_token_meets_its_own_experts_only():
  sizes = {"num_layers": 1, "embed_dim": 4, "mlp_dim": 6}
  experts = Experts(number=8, per_token=2, mlp_dim=3, normalised=True)
  dense = flops.active_params(tiny_llama.config(**sizes))
  sparse = flops.active_params(tiny_llama.config(**sizes, experts=experts))
  assert sparse - dense == 2 * 3 * 4 * 3 + 4 * 8 - 3 * 4 * 6


@pytest.mark.parametrize("window", [0, 1, 3, 7, 9])
def test_visible_pairs_are_those_of_the_mask(window):
  length = 7
  pairs = sum(
      1
      for query in range(length)
      for key in range(query + 1)
      if not window or query - key < window
  )
  assert flops.visible_pairs(length, window) == pairs


def test_traced_flops_count_loops_as_often_as_they_run():
  w = jax.ShapeDtypeStruct((8, 8), jnp.float32)
  x = jax.ShapeDtypeStruct((3, 8), jnp.float32)

  def scanned(x, w):
    return jax.lax.scan(lambda y, _: (y @ w, None), x, None, length=5)[0]

  def looped(x, w):
    return jax.lax.while_loop(lambda y: y[0, 0] > 0, lambda y: y @ w, x)

  def branched(x, w):
    return jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x)

  def unused(x, w):
    return jax.jit(lambda x: (x @ w, x @ w @ w))(x)[0]

  def recomputed(x, w):
    layer = jax.checkpoint(lambda x: jnp.sin(x @ w))
    return jax.value_and_grad(lambda x: layer(x).sum())(x)

  one = 2 * 3 * 8 * 8
  for function, times in (
      (scanned, 5),
      (looped, 7),
      (branched, 2),
      (unused, 1),
      (recomputed, 3),  # forward, forward once more, backward
  ):
    work = flops.traced(jax.make_jaxpr(function)(x, w), loops=7)
    assert work == flops.Work(products=times * one), function


def test_traced_flops_of_ragged_products_and_their_gradients():
  x = jax.ShapeDtypeStruct((12, 8), jnp.float32)
  w = jax.ShapeDtypeStruct((4, 8, 5), jnp.float32)
  sizes = jax.ShapeDtypeStruct((4,), jnp.int32)

  def loss(x, w, sizes):
    return (jax.lax.ragged_dot(x, w, sizes) ** 2).sum()

  gradients = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(x, w, sizes)
  assert flops.traced(gradients).kernels == 3 * 2 * 12 * 8 * 5


def tiny_plan(**changes):
  values = {
      "config": tiny_llama.config(
          vocab_size=24, num_layers=2, execution=Execution(logit_columns=4)
      ),
      "lora": None,
      "mesh": {"data": 1, "fsdp": 2, "tensor": 2, "expert": 1},
      "devices": jax.devices()[:4],
      "sampler_tensor": 2,
      "shape": BatchShape(
          rows=4, row_tokens=8, trajectories=4, row_targets=8, least_shared=0
      ),
      "objective": objectives.ImitationLoss(context_weight=0.1),
      "optimizer": optim.AdamW(
          b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.0, clip_norm=1.0
      ),
      "temperature": 1.0,
      "reference": "none",
      "engine": {
          "num_slots": 2,
          "context": 8,
          "block": 8,
          "prefill_tokens": 8,
          "prefill_buckets": (4,),
          "decode_steps": 3,
          "decode_rows": 0,
      },
  }
  return programs.Plan(**values | changes)


def test_a_sampler_may_take_more_devices_than_the_learner():
  plan = tiny_plan(mesh={"data": 1, "fsdp": 1, "tensor": 1, "expert": 1})
  sizes = {n: make().mesh.size for n, make in programs.programs(plan).items()}
  assert sizes == {"accumulate": 1, "apply": 1, "prefill": 2, "decode": 2}


@dataclasses.dataclass(frozen=True)
class Chip:
  """A device of a slice that is elsewhere."""

  id: int
  slice_index: int = 0


def test_policies_of_a_recipe_get_chips_of_their_own(monkeypatch):
  four = types.SimpleNamespace(devices=[Chip(number) for number in range(4)])
  monkeypatch.setattr(pods.topologies, "get_topology_desc", lambda **_: four)
  config = quickstart.get_config()
  config.policies.main.lora.rank = 2
  plans = pods.plans(config, V5E)
  assert [plan.devices for plan in plans.values()] == [(Chip(0),), (Chip(1),)]
  assert plans["main"].lora.rank == 2
  assert plans["researcher"].lora is None
  config.policies.main.mesh.fsdp = 2
  config.policies.researcher.mesh.tensor = 4
  with pytest.raises(ValueError, match="main 2, researcher 4 devices.*v5e-4"):
    pods.plans(config, V5E)


def test_programs_of_another_slice_are_compiled_for_the_first(monkeypatch):
  chips_of = {
      s: [Chip(4 * s + n, slice_index=s) for n in range(4)] for s in (0, 1)
  }
  both = types.SimpleNamespace(devices=[*chips_of[0], *chips_of[1]])
  monkeypatch.setattr(pods.topologies, "get_topology_desc", lambda **_: both)
  config = quickstart.get_config()
  config.batch.rows = 4
  for name in ("main", "researcher"):
    config.policies[name].mesh.data = 4
  plans = pods.plans(config, chips.parse("2xv5e-4"))
  assert [plan.devices for plan in plans.values()] == [tuple(chips_of[0])] * 2


def test_an_adapter_is_small_and_its_base_stays():
  adapted = LoRA(rank=1, alpha=2.0, targets=("query", "down"))
  whole, small = (
      programs.programs(tiny_plan(lora=one)) for one in (None, adapted)
  )
  train, step = small["accumulate"](), small["apply"]()
  weights = whole["accumulate"]().held["parameters"]
  assert train.held["loaded"] == weights
  assert 0 < train.held["parameters"] < weights / 4
  assert step.held["optimizer"] == 2 * train.held["parameters"] + 4
  train.traced.lower().compile()


def test_weights_to_begin_with_stay_only_where_they_are_read():
  for reference, names in (
      ("none", set()),
      ("first", {"loaded"}),
      ("moving", {"reference"}),
  ):
    step = programs.programs(tiny_plan(reference=reference))["apply"]()
    kept = step.held.keys() & {"loaded", "reference"}
    assert kept == names
    assert all(step.held[name] == step.held["parameters"] for name in kept)


def test_programs_of_a_policy_compile_from_shapes_alone():
  plan = tiny_plan()
  traced = {name: make() for name, make in programs.programs(plan).items()}
  whole = 4 * params.num_params(plan.config)
  train, sampled = traced["accumulate"], traced["decode"]
  # Norms and what `tensor` does not split are whole on more devices.
  assert whole / 4 < train.held["parameters"] < whole / 2
  assert traced["apply"].held["optimizer"] == 2 * train.held["parameters"] + 4
  heads, width = plan.config.num_kv_heads, plan.config.head_dim
  assert sampled.held["cache"] == 2 * 2 * 2 * 8 * heads * width * 4 // 2
  model = flops.training(plan.config, rows=4, length=8, targets=8)
  assert 0.8 < train.work.products / model < 2
  for name, one in traced.items():
    compiled = one.traced.lower().compile()
    memory = compiled.memory_analysis()
    held = sum(one.held.values())
    # Lengths and seeds come on top; what a program does not read is dropped,
    # such as the unembedding where a prompt is prefilled.
    assert held / 2 < memory.argument_size_in_bytes < held + 256, name


def test_rows_of_a_traced_update_share_where_a_runs_would():
  shape = dataclasses.replace(tiny_plan().shape, least_shared=2)
  reading = tiny_plan(shape=shape)
  plain = objectives.ImitationLoss(context_weight=0.0)
  held = [
      programs.programs(plan)["accumulate"]().held["batch"]
      for plan in (reading, tiny_plan(shape=shape, objective=plain))
  ]
  # A number for each token of the rows, halved between the devices.
  assert held[1] - held[0] == 4 * 4 * 8 / 2


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"sampler_tensor": 3}, "multiple of 3"),
        (
            {
                "shape": BatchShape(
                    rows=3,
                    row_tokens=8,
                    trajectories=4,
                    row_targets=8,
                    least_shared=0,
                )
            },
            "multiple of 2",
        ),
    ],
)
def test_what_does_not_divide_is_named_before_anything_is_traced(changes, hint):
  with pytest.raises(ValueError, match=hint):
    tiny_plan(**changes)


PROGRAM = """\
HloModule m

%all-reduce-scatter.1 (p.0: bf16[64,8]) -> bf16[16,8] {
  %p.0 = bf16[64,8]{1,0} parameter(0)
  %all-reduce.5 = bf16[64,8]{1,0} all-reduce(%p.0), channel_id=3, \
replica_groups=mesh['a'=4,'b'=2] {'a'}, to_apply=%add
}

%part.1 (p.1: bf16[4,8]) -> bf16[8,8] {
  %p.1 = bf16[4,8]{1,0} parameter(0)
  %all-gather.1 = bf16[8,8]{1,0:T(8,128)(2,1)} all-gather(%p.1), \
channel_id=1, replica_groups=[4,2]<=[8], dimensions={0}
}

%cond (p.2: (s32[], f32[16])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(30)
  %p.2 = (s32[], f32[16]) parameter(0)
  %i = s32[] get-tuple-element(%p.2), index=0
  ROOT %lt = pred[] compare(%i, %constant.1), direction=LT
}

%body (p.3: (s32[], f32[16])) -> (s32[], f32[16]) {
  %p.3 = (s32[], f32[16]) parameter(0)
  %x = f32[16]{0} get-tuple-element(%p.3), index=1
  %start = bf16[8,8]{1,0} fusion(%x), kind=kCustom, calls=%part.1
  %done = bf16[8,8]{1,0:S(1)} fusion(%x), kind=kCustom, calls=%part.1, \
backend_config={"window_config":{"estimated_cycles":"100"}}
  %scattered = bf16[16,8]{1,0} fusion(%x), calls=%all-reduce-scatter.1
}

ENTRY %main (a: f32[16]) -> f32[16] {
  %a = f32[16]{0} parameter(0)
  %loop = (s32[], f32[16]{0}) while(%a), condition=%cond, body=%body
  %ahead = (f32[16]{0:S(1)}, f32[16]{0}, u32[]{:S(2)}) copy-start(%a)
  %moved = f32[16]{0} collective-permute(%a), channel_id=9, \
source_target_pairs={{0,1},{1,0}}
  ROOT %sum = f32[16]{0} all-reduce(%a), channel_id=7, \
replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add, \
backend_config={"window_config":{"estimated_cycles":"7"}}
}
"""


def test_collectives_of_a_program_are_found_once_and_times_their_loop():
  costs = hlo.parse(PROGRAM)
  found = {
      (one.kind, one.size, one.group, one.times) for one in costs.collectives
  }
  assert found == {
      ("all-gather", 128, 2, 30),  # its start and its end are one
      ("reduce-scatter", 1024, 4, 30),  # as TPUs write it
      ("collective-permute", 64, 1, 1),
      ("all-reduce", 64, 4, 1),
  }
  assert costs.cycles == 30 * 100 + 7
  assert costs.unknown_loops == 0


def test_bytes_are_those_that_leave_memory_or_reach_it():
  # In the loop: x is read three times; two results are in memory.
  inside = 3 * 64 + 128 + 256
  # After it: a is fetched once, and exchanged twice, read and written.
  assert hlo.parse(PROGRAM).bytes == 30 * inside + 64 + 2 * 2 * 64


PIECES = """\
HloModule m

%inner (p.1: f32[64,8], p.2: s32[], p.3: f32[512,8]) -> f32[64,8] {
  %p.1 = f32[64,8]{1,0} parameter(0)
  %p.2 = s32[] parameter(1)
  %p.3 = f32[512,8]{1,0} parameter(2)
  %old = f32[1,8]{1,0} dynamic-slice(%p.1, %p.2, %p.2), sizes={1,8}
  %rows = f32[4,8]{1,0} dynamic-slice(%p.3, %p.2, %p.2), sizes={4,8}
  %new = f32[1,8]{1,0} reduce(%rows, %old), dimensions={0}
  ROOT %sum = f32[64,8]{1,0} dynamic-update-slice(%p.1, %new, %p.2, %p.2)
}

ENTRY %main (a: f32[64,8], b: s32[], c: f32[512,8]) -> f32[64,8] {
  %a = f32[64,8]{1,0} parameter(0)
  %b = s32[] parameter(1)
  %c = f32[512,8]{1,0} parameter(2)
  ROOT %f = f32[64,8]{1,0} fusion(%a, %b, %c), kind=kLoop, calls=%inner
}
"""


def test_a_piece_of_an_array_is_not_all_of_it():
  # A row is read and written, four rows are read, and where they stand.
  assert hlo.parse(PIECES).bytes == 2 * 32 + 4 * 32 + 4


def test_what_lives_on_the_chip_is_not_read_from_memory():
  shape = "(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, pred[5]{0}, s4[4]{0})"
  assert hlo.num_bytes(shape) == 12 + 5 + 2
  assert hlo.num_bytes(shape, memory_only=True) == 5 + 2


def test_a_program_without_entry_is_refused():
  with pytest.raises(ValueError, match="ENTRY"):
    hlo.parse("HloModule m\n")


def test_seconds_on_the_links():
  one = hlo.Collective(kind="all-gather", size=4 * 10**9, group=4, times=2)
  kinds = report.summarise([one], V5E)
  # Three quarters come from the three others, over 2 links in each of 2 axes.
  assert kinds["all-gather"]["seconds"] == pytest.approx(2 * 3e9 / (4 * 45e9))
  assert kinds["all-gather"]["count"] == 2


def program(name="accumulate", **changes):
  values = {
      "name": name,
      "devices": 4,
      "held": {"parameters": 2**30, "gradients": 2**30},
      "outputs": 2**29,
      "temporaries": 3 * 2**30,
      "code": 0,
      "flops": 1e12,
      "bytes_moved": 1e9,
      "counted_once": {"flops": 1e11, "bytes accessed": 1e8},
      "collectives": {
          "all-gather": {"count": 3, "bytes": 2**31, "seconds": 0.1}
      },
      "seconds": {"flops": 0.01, "compiler": 0.5, "links": 0.1},
  }
  return report.ProgramReport(**values | changes)


def test_memory_counts_what_programs_share_once():
  other = program(
      "apply",
      held={"parameters": 2**30, "optimizer": 2**31},
      temporaries=0,
      outputs=2**30,
  )
  assert report.resident([program(), other]) == {
      "parameters": 2**30,
      "gradients": 2**30,
      "optimizer": 2**31,
      "working": 3 * 2**30 + 2**29,
      "total": 7 * 2**30 + 2**29,
  }


def test_bound_of_the_utilisation():
  other = program("apply", seconds={"compiler": 0.25, "links": 0.5})
  bound = report.mfu_bound(4 * 197e12 * 0.4, [program(), other], V5E)
  assert bound == pytest.approx(0.4)


def test_rows_say_what_limits_a_program():
  lines = report.table(report.program_rows([program()])).splitlines()
  assert lines[1].split()[:4] == ["accumulate", "4", "3.00", "0.50"]
  assert "500 ms  compiler" in lines[1]
  assert len({len(line.rstrip()) for line in lines}) <= 2
  lines = report.table(report.collective_rows([program()])).splitlines()
  assert lines[1].split() == [
      "accumulate",
      "all-gather",
      "3",
      "2.00",
      "100",
      "ms",
  ]


MESSAGE = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in"
    " memory space hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by"
    " 4.75G."
)


def test_a_program_that_is_too_large_says_how_it_would_fit():
  failure = report.too_large("accumulate", MESSAGE)
  mesh = {"data": 2, "fsdp": 4, "tensor": 1, "expert": 1}
  line = report.advice(failure, mesh=mesh, rows=16, remat=False)
  assert "needs 20.50 GiB a device, 4.75 GiB more than the 15.75 GiB" in line
  for hint in ("execution.remat", "mesh.fsdp in place", "batch.rows (16) to 8"):
    assert hint in line
  sampling = report.advice(
      report.too_large("decode", MESSAGE), mesh=mesh, rows=16, remat=True
  )
  assert "sampler_tensor" in sampling
  assert report.too_large("apply", "something else") is None


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("qwen3_30b_a3b", 30.53),
        ("qwen3_8b", 8.19),
        ("gemma3_4b", 3.88),
        ("gemma3_1b", 1.00),
        ("smollm2_135m", 0.1345),
    ],
)
def test_architectures_have_the_published_number_of_parameters(name, billions):
  config = huggingface.read(pods.ARCHITECTURES[name](), name)
  assert params.num_params(config) / 1e9 == pytest.approx(billions, rel=2e-3)
  assert name in dir(architectures)


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("--topology=v7-4",), "topology 'v7-4'"),
        (("--topology=v5e-4", "--programs=train"), "--programs: unknown train"),
    ],
)
def test_misuse_is_one_line_and_exit_code_2(arguments, hint):
  assert hint in refused(command("aot", QUICKSTART, *arguments))


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: pip install -e '.[tpu]'",
)
def test_a_tiny_team_compiles_for_tpu(tmp_path):
  out = f"--out={tmp_path}"
  ran = command("aot", QUICKSTART, "--topology=v5e-4", out, timeout=900)
  assert ran.returncode == 0, ran.stderr
  (path,) = tmp_path.glob("*.json")
  written = json.loads(path.read_text())
  main = written["policies"]["main"]
  assert main["fits"] and 0 < main["mfu_bound"] < 1
  names = [one["name"] for one in main["programs"]]
  assert names == ["accumulate", "apply", "prefill", "decode"]
  assert all(math.isfinite(one["bound_seconds"]) for one in main["programs"])
