"""vLLM, in its own environment: generate, and agents' traffic.

    PYTHON -m experiments.bench.workers.of_vllm DIRECTORY DTYPE CONTEXT SLOTS

Requests and answers: see `pipe`. The engine lives in this process, without a
server; prefix caching is on.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from experiments.bench.workers import pipe, traffic

# Before vLLM is imported. One process, on all cores as it binds threads itself;
# 2 GiB of cache; nothing is looked up.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def main() -> None:
  """Loads the policy and answers."""
  wire = pipe.Pipe()
  from vllm import LLM

  directory, dtype, context, slots = sys.argv[1:]
  llm = LLM(
      directory,
      dtype=dtype,
      max_model_len=int(context),
      max_num_seqs=int(slots),
      skip_tokenizer_init=True,
      enable_prefix_caching=True,
      disable_log_stats=True,
  )
  numbers = iter(range(2**62))

  def generate(prompts: Sequence[Sequence[int]], new: int) -> dict[str, Any]:
    asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    start = time.perf_counter()
    told = llm.generate(asked, _sampling(new), use_tqdm=False)
    seconds = time.perf_counter() - start
    tokens = sum(len(one.outputs[0].token_ids) for one in told)
    return {"seconds": seconds, "tokens": tokens}

  def converse(calls: Sequence[traffic.Call]) -> dict[str, Any]:
    start = time.perf_counter()
    tokens = _converse(llm.llm_engine, calls, numbers)
    return {"seconds": time.perf_counter() - start, "tokens": tokens}

  wire.serve({"generate": generate, "converse": converse})


def _sampling(count: int) -> Any:
  """How tokens are sampled: all that are asked for, from the softmax."""
  from vllm import SamplingParams

  return SamplingParams(
      temperature=1.0, max_tokens=count, ignore_eos=True, detokenize=False
  )


def _converse(engine: Any, calls: Sequence[traffic.Call], numbers: Any) -> int:
  """Plays calls side by side; returns how many tokens were sampled."""
  playing = {}
  tokens = 0

  def ask(play: Any, turn: traffic.Turn) -> None:
    name = f"{turn.call}/{next(numbers)}"
    prompt = {"prompt_token_ids": turn.tokens}
    engine.add_request(name, prompt, _sampling(turn.count))
    playing[name] = play

  for index, call in enumerate(calls):
    play = traffic.play(call, str(index))
    ask(play, next(play))
  while playing:
    for told in engine.step():
      if not told.finished:
        continue
      play = playing.pop(told.request_id)
      sampled = list(told.outputs[0].token_ids)
      tokens += len(sampled)
      try:
        ask(play, play.send(sampled))
      except StopIteration:
        continue
  return tokens


if __name__ == "__main__":
  main()
