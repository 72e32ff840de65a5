"""A mixture of experts, dropless: every token reaches all its experts.

Tokens are sorted by expert, and each expert multiplies its own run of them
(`jax.lax.ragged_dot`). Under a mesh every device computes the experts it holds
for the tokens it holds; their parts are added over `expert` and `tensor`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mgrpo_jax import sharding
from mgrpo_jax.policy.config import Experts, TransformerConfig
from mgrpo_jax.policy.params import Layer

Activation = Callable[[Array], Array]

_TILE = 2048  # rows of one kernel that its gradient takes in at once


def mix(
    layer: Layer,
    normed: Float[Array, "N T E"],
    activation: Activation,
    *,
    config: TransformerConfig,
) -> Float[Array, "N T E"]:
  """Sends every token to its likeliest experts and adds what they say.

      out = Σ_{x in top-k} p[x] · down[x] (act(gate[x] y) * (up[x] y)),
      p = softmax(router y), scaled to sum to 1 over the k where `normalised`

  Args:
    layer: weights, gate, up and down of X experts.
    normed: y, the normed residual stream.
    activation: of the gate.
    config: sizes.

  Returns:
    What is added to the residual stream.
  """
  if config.experts is None:
    raise ValueError("config.experts must be set for a layer with a router")
  local = functools.partial(_mix, activation=activation, experts=config.experts)
  weights = [
      jnp.asarray(weight, config.dtype)
      for weight in (layer.router, layer.gate, layer.up, layer.down)
  ]
  if jax.sharding.get_abstract_mesh().empty:
    return local(normed, normed, *weights, first=0)

  def on_device(y: Array, *shards: Array) -> Array:
    router, *kernels = (
        jax.lax.all_gather(shard, "fsdp", axis=axis, tiled=True)
        for shard, axis in zip(shards, (0, 1, 1, 2), strict=True)
    )
    gate, up, down = (
        jax.lax.pcast(kernel, "data", to="varying") for kernel in kernels
    )
    first = jax.lax.axis_index("expert") * gate.shape[0]
    # Said here, where it is one row a token, gradients are added once, and not
    # for every expert a token is sent to.
    spread = jax.lax.pcast(y, ("tensor", "expert"), to="varying")
    part = local(y, spread, router, gate, up, down, first=first)
    return jax.lax.psum(part, ("tensor", "expert"))

  stream = sharding.spec("batch", "length", "hidden")
  kernel = sharding.spec("expert", "embed", "mlp")
  return jax.shard_map(
      on_device,
      in_specs=(
          stream,
          sharding.spec("embed", "router"),
          kernel,
          kernel,
          sharding.spec("expert", "mlp", "embed"),
      ),
      out_specs=stream,
  )(normed, *weights)


def _mix(
    y: Float[Array, "N T E"],
    spread: Float[Array, "N T E"],
    router: Float[Array, "E X"],
    gate: Float[Array, "local E F"],
    up: Float[Array, "local E F"],
    down: Float[Array, "local F E"],
    *,
    first: int | Int[Array, ""],
    activation: Activation,
    experts: Experts,
) -> Float[Array, "N T E"]:
  """Computes the part of experts first.. of the mixture.

  `spread` is y, as what differs between the devices that share its tokens.
  """
  share, chosen = _route(y.reshape(-1, y.shape[-1]), router, experts)
  tokens = spread.reshape(-1, y.shape[-1])
  order, sizes = _by_expert(chosen - first, gate.shape[0])
  rows = tokens[order // experts.per_token]
  split = gate.shape[0] < experts.number
  if split:
    # Rows of other devices' experts come last; what products leave there,
    # going forward or backward, is undefined.
    here = jnp.arange(len(order))[:, None] < jnp.sum(sizes)
    rows = jnp.where(here, rows, 0.0)
  inner = activation(multiply(rows, gate, sizes)) * multiply(rows, up, sizes)
  added = multiply(inner, down, sizes)
  if split:
    added = jnp.where(here, added, 0.0)
  back = added[_argsort(order)].reshape(*chosen.shape, -1)
  mixed = jnp.einsum("akd,ak->ad", back, share.astype(back.dtype))
  return mixed.reshape(y.shape)


@jax.custom_vjp
def multiply(
    rows: Float[Array, "A I"],
    kernels: Float[Array, "X I O"],
    sizes: Int[Array, " X"],
) -> Float[Array, "A O"]:
  """Multiplies runs of rows with a kernel each, like `jax.lax.ragged_dot`.

  Only its gradient differs: compilers for TPUs (libtpu 0.0.42) multiply all
  rows for every kernel to get the kernels' gradient, X times the work.

  Args:
    rows: sorted by kernel.
    kernels: X of them; under `shard_map` they vary over the axes that rows do.
    sizes: rows of each kernel, int32; rows beyond their sum belong to none.

  Returns:
    Products; undefined for rows of no kernel, and so are their gradients.
  """
  return jax.lax.ragged_dot(rows, kernels, group_sizes=sizes)


def _multiply_forward(
    rows: Array, kernels: Array, sizes: Array
) -> tuple[Array, tuple[Array, Array, Array]]:
  """Keeps the arguments."""
  return multiply(rows, kernels, sizes), (rows, kernels, sizes)


def _multiply_backward(
    kept: tuple[Array, Array, Array], cotangent: Array
) -> tuple[Array, Array, None]:
  """Pulls a cotangent of the products back."""
  rows, kernels, sizes = map(jnp.asarray, kept)
  transposed = jnp.swapaxes(kernels, 1, 2)
  to_rows = jax.lax.ragged_dot(cotangent, transposed, group_sizes=sizes)
  to_kernels = _kernel_gradients(rows, cotangent, sizes)
  return to_rows, to_kernels.astype(kernels.dtype), None


multiply.defvjp(_multiply_forward, _multiply_backward)


def _kernel_gradients(
    rows: Float[Array, "A I"],
    cotangent: Float[Array, "A O"],
    sizes: Int[Array, " X"],
) -> Float[Array, "X I O"]:
  """Adds up, tile by tile of one kernel's rows, what each kernel is told."""
  number, tile = len(sizes), min(_TILE, len(rows))
  ends = jnp.cumsum(sizes)
  tiles = -(-sizes // tile)
  last = jnp.cumsum(tiles)  # those of a kernel and of all before it
  most = len(rows) // tile + number  # each kernel's last tile may be short
  places = jnp.arange(most)
  kernels = jnp.sum(last[None] <= places[:, None], axis=1)
  kernels = jnp.minimum(kernels, number - 1)
  done = places - (last - tiles)[kernels]
  firsts = (ends - sizes)[kernels] + done * tile

  def add(total: Array, one: tuple[Array, Array, Array]) -> tuple[Array, None]:
    kernel, first, end = one
    start = jnp.clip(first, 0, len(rows) - tile)
    index = start + jnp.arange(tile)
    own = ((index >= first) & (index < end))[:, None]
    left, right = (
        jnp.where(own, jax.lax.dynamic_slice_in_dim(x, start, tile), 0.0)
        for x in (rows, cotangent)
    )
    part = jnp.einsum(
        "ai,ao->io", left, right, preferred_element_type=total.dtype
    )
    return total.at[kernel].add(part), None

  wide = jnp.promote_types(rows.dtype, jnp.float32)
  shape = (number, rows.shape[1], cotangent.shape[1])
  # Always 0; so the sum varies over the mesh axes that its terms do.
  same = (rows[0, 0] == 0) & (cotangent[0, 0] == 0) & (sizes[0] == 0)
  zeros = jnp.zeros(shape, wide) + jnp.where(same, 0.0, 0.0)
  total, _ = jax.lax.scan(add, zeros, (kernels, firsts, ends[kernels]))
  # Else the sum takes the layout that its exchange between devices wants, and
  # every tile is copied into and out of it.
  return jax.lax.optimization_barrier(total)


def _route(
    tokens: Float[Array, "A E"],
    router: Float[Array, "E X"],
    experts: Experts,
) -> tuple[Float[Array, "A k"], Int[Array, "A k"]]:
  """Picks each token's experts, and what each of them counts."""
  scores = jnp.einsum(
      "ae,ex->ax", tokens, router, preferred_element_type=jnp.float32
  )
  share, chosen = jax.lax.top_k(
      jax.nn.softmax(scores, axis=-1), experts.per_token
  )
  if experts.normalised:
    share = share / jnp.sum(share, axis=-1, keepdims=True)
  return share, chosen


def _by_expert(
    chosen: Int[Array, "A k"], number: int
) -> tuple[Int[Array, " Ak"], Int[Array, " number"]]:
  """Sorts assignments to experts 0..number-1 to the front, and counts them."""
  flat = chosen.reshape(-1)
  held = jnp.where((flat >= 0) & (flat < number), flat, number)
  own = held[:, None] == jnp.arange(number)[None]
  return _argsort(held), jnp.sum(own, axis=0, dtype=jnp.int32)


def _argsort(keys: Int[Array, " Ak"]) -> Int[Array, " Ak"]:
  """Sorts indices by key; they vary over the mesh axes that the keys do.

  `jnp.argsort` forgets that (jax 0.10.2), and gradients through what it
  gathers then lack a sum over those axes.
  """
  index = jax.lax.iota(keys.dtype, keys.size) + 0 * keys
  return jax.lax.sort((keys, index), num_keys=1)[1]
