"""Every hyper-parameter of a run, once: value, unit, range, meaning.

Recipes start from this and state what they change. The values are the
paper's where it prints them, else those of the quickstart.
"""

import ml_collections


def role(policy: str) -> ml_collections.ConfigDict:
  """One place in the team; recipes override what differs."""
  config = ml_collections.ConfigDict()
  config.policy = policy  # name of the policy that plays it
  config.prompt = ""  # system prompt; empty for the compact protocol
  config.tools = ()  # of search, visit, calculate
  config.calls = ()  # names of the child roles it may call
  config.max_turns = 6  # turns, >= 1
  config.max_new_tokens = 32  # tokens a turn, >= 1
  config.max_context = 256  # tokens of the whole stream, >= 1
  config.max_calls = 4  # child calls, >= 0
  config.attempts = 1  # at a sub-task given to it, >= 1; the first is reported
  config.trainable = True  # whether its calls train its policy
  # R = format_share * format + correct_share * correct + expert_share *
  # expert (Eq. 4-5); shares in [0, 1].
  config.format_share = 0.1
  config.correct_share = 0.9
  config.expert_share = 0.0
  return config.lock()


def policy() -> ml_collections.ConfigDict:
  """One set of weights; recipes override what differs."""
  config = ml_collections.ConfigDict()
  # A directory, a .gguf file, 'smollm2', or 'random': a transformer of the
  # shape below with a tokenizer learned from the training places.
  config.source = "random"
  # A function of configs/architectures.py whose sizes experiments.aot compiles;
  # empty for those of the config.json in the source.
  config.architecture = ""
  config.trainable = True  # False freezes it in every stage
  config.vocab_size = 512  # pieces, special tokens included; for 'random'
  config.embed_dim = 96
  config.num_layers = 3
  config.num_heads = 4
  config.num_kv_heads = 4
  config.head_dim = 24
  config.mlp_dim = 288
  config.rope_base = 10_000.0  # of the rotary frequencies, > 0
  config.norm_eps = 1e-5  # added to mean squares, > 0
  config.tokenizer_share = 0.15  # of the training text it learns pieces from
  config.lora = ml_collections.ConfigDict()  # train an adapter, not the weights
  config.lora.rank = 0  # of the two factors, >= 1; 0 trains all weights
  config.lora.alpha = (
      16.0  # the factors' product is scaled by alpha / rank, > 0
  )
  # Kernels of a layer that it changes; those of the experts where there are.
  config.lora.targets = (
      "query",
      "key",
      "value",
      "output",
      "gate",
      "up",
      "down",
  )
  _add_devices(config)
  _add_external(config)
  return config.lock()


def symbolic(code: str) -> ml_collections.ConfigDict:
  """One policy that is plain code; recipes name its function."""
  config = ml_collections.ConfigDict()
  config.code = code  # calculate or look_up, see agents/symbolic.py
  return config.lock()


def _add_devices(config: ml_collections.ConfigDict) -> None:
  """What a policy runs on, and how; changes time and memory only."""
  config.dtype = "float32"  # of activations, or bfloat16
  config.mesh = ml_collections.ConfigDict()  # devices: the product of the four
  config.mesh.data = 1  # replicas of the weights, >= 1
  config.mesh.fsdp = 1  # pieces that weights are kept in, >= 1
  config.mesh.tensor = 1  # pieces of heads, feed-forward, vocabulary, >= 1
  config.mesh.expert = 1  # pieces that experts are split in, >= 1
  config.sampler_tensor = 1  # devices that the sampler's heads are split over
  config.execution = ml_collections.ConfigDict()
  config.execution.attention = "blockwise"  # or splash: a kernel, TPU only
  # Of new tokens to their cache: by blocks of it, or by what reads of each
  # slot what it holds. native, CPU only: a float32 program, which a compiler
  # of C++ builds at first use. paged, TPU only: a kernel, for sampled tokens,
  # wants engine.context a multiple of 16, engine.block as large,
  # engine.decode_rows = 0 and layers without a window. Both want
  # sampler_tensor = 1.
  config.execution.decode_attention = "blocks"
  # What of a layer is kept for the backward pass and not computed again: none
  # keeps all; dots its products, attention what was attended to, layer nothing.
  config.execution.remat = "none"
  config.execution.scan_layers = False  # one loop: compiles faster, fuses less
  # Tokens of a row with logits at once, >= 1; the backward pass computes them
  # again, unless these are all (row_targets, row_tokens where imitating).
  config.execution.logit_columns = 64
  # How the sampler keeps kernels: as trained; turned, outputs first; or tiled,
  # in tiles of its own products, which a compiler of C++ builds at first use.
  # Both are faster on CPUs, where few tokens meet large kernels (not the
  # quickstart's), and round otherwise; tiled is fastest, for float32 only.
  config.execution.kernels = "trained"


def _add_external(config: ml_collections.ConfigDict) -> None:
  """Who else samples a policy: a server with an OpenAI-compatible interface."""
  config.external = ml_collections.ConfigDict()
  config.external.url = ""  # http://host:port/v1; empty: this process does
  config.external.dialect = "vllm"  # or mgrpo: experiments.serve
  config.external.model = ""  # the policy's name there; empty for the same
  # Where versions of its weights are written. The server reads them under this
  # path; experiments.serve must have --weights_from=DIR for DIR/NAME.
  config.external.folder = ""
  config.external.token_file = ""  # that holds the server's token; '' for none
  config.external.max_concurrent = 64  # requests at a time, >= 1
  config.external.timeout = 120.0  # seconds of an answer or a loading, > 0
  config.external.attempts = 5  # of a request that fails, in all, >= 1


def stage(objective: str, steps: int) -> ml_collections.ConfigDict:
  """One stretch of the curriculum; recipes override what differs."""
  config = ml_collections.ConfigDict()
  config.objective = objective  # 'imitate' the expert, or 'reinforce'
  config.steps = steps  # batches, >= 0
  config.families = ()  # of questions to draw from; empty for all
  config.trained = ()  # policies that learn; empty for all trainable ones
  config.learning_rate = 1e-3  # peak, > 0
  config.hasty = 0.0  # imitation: share of calls cut short, see expert.py
  # The rate falls along a cosine to this share of the peak; 1 keeps it.
  config.final_fraction = 1.0  # in [0, 1]
  # By role, what its rewards count here: any of format_share, correct_share,
  # expert_share in [0, 1] and overlong_share >= 0, as a recipe says it in
  # `config.stages.hard.reward.researcher = {"expert_share": 0.2}`, a command as
  # `--config.stages.hard.reward='{"researcher": {"expert_share": 0.2}}'`; the
  # rest is the run's. Imitation shows rewards and does not learn from them.
  config.reward = ml_collections.ConfigDict()
  # Who plays here: by role, the policy that plays it in place of its own, in a
  # recipe `config.stages.hard.cast.researcher = "scout"`, in a command
  # `--config.stages.hard.cast='{"researcher": "scout"}'`; and roles that are
  # not there and cannot be called. What that comes to: docs/decoupled.md.
  config.cast = ml_collections.ConfigDict()
  config.without = ()  # names of roles, not the root's
  config.lock().reward.unlock()
  config.cast.unlock()
  return config


def get_config() -> ml_collections.ConfigDict:
  """Returns the defaults; recipes add roles, policies and stages."""
  config = ml_collections.ConfigDict()
  config.name = "default"
  config.seed = 0  # of task order, sampling, alignment and initialisation

  config.team = ml_collections.ConfigDict()
  config.team.protocol = "compact"  # or hermes, or llama (Llama 3's JSON)
  config.team.root = "main"
  config.team.roles = ml_collections.ConfigDict()
  config.policies = ml_collections.ConfigDict()
  config.symbolic = ml_collections.ConfigDict()  # policies without weights
  config.curriculum = ()  # names of the stages, in order
  config.stages = ml_collections.ConfigDict()
  # Tokens after which no further step begins, whatever steps are left; stages
  # keep their schedule: a rate that falls ends where it has come to.
  config.budget = ml_collections.ConfigDict()
  config.budget.trained_tokens = 0  # that are trained on, >= 0; 0 for no end
  config.budget.generated_tokens = 0  # sampled in rollouts, >= 0; 0 for no end

  _add_tasks(config)
  _add_sampling(config)
  _add_method(config)
  _add_optimisation(config)
  _add_bookkeeping(config)
  config.lock()  # a recipe that mistypes a key is told so
  for named in (
      config.team.roles,
      config.policies,
      config.symbolic,
      config.stages,
  ):
    named.unlock()
  return config


def _add_tasks(config: ml_collections.ConfigDict) -> None:
  """What the team is asked, and what its tools show."""
  config.tasks = ml_collections.ConfigDict()
  config.tasks.seed = 0  # of which questions are drawn, and their wordings
  config.tasks.per_step = 8  # B, tasks a step, >= 1
  # Rounds in which groups without an advantage are replaced by new ones, >= 0;
  # 0 with plain, per_batch and per_block, where equal rewards may teach.
  config.tasks.resample = 0
  config.tasks.max_retries = 3  # in a row, of a task that was put back, >= 0
  config.tasks.renamed = 0.8  # share of demonstrations under other names

  config.tools = ml_collections.ConfigDict()
  config.tools.search_results = 3  # results a search lists, >= 1
  config.tools.title_weight = 10  # times a title counts as text, >= 1
  config.tools.max_chars = 160  # characters of one tool result, >= 32
  config.tools.deadline = 10.0  # seconds, > 0


def _add_sampling(config: ml_collections.ConfigDict) -> None:
  """How rollouts are sampled."""
  config.rollout = ml_collections.ConfigDict()
  config.rollout.per_task = 8  # K, rollouts a task; the paper's 8
  # Rollouts of a task begun beyond K, >= 0: they stand in for those that a
  # machine failed on, and after `patience` seconds (0 for never) for those that
  # are late, which bends groups towards short rollouts; see docs/practice.md.
  config.rollout.spare = 0
  config.rollout.patience = 0.0
  config.rollout.temperature = 1.0  # of training samples, >= 0.001
  config.rollout.turn_deadline = 120.0  # seconds a turn may take, > 0
  config.rollout.watchdog = 60.0  # seconds until a waiting call is named, > 0
  # Seconds for a step's rollouts, or an evaluation's, in all; then the run ends
  # and names what they wait for, > 0.
  config.rollout.deadline = 7200.0
  config.rollout.max_attempts = 3  # of a call that FAILED, in all, >= 1
  # Steps that are rolled out ahead of the one being trained on, and with that
  # the updates that a policy may be ahead of a group's tokens: 0, in step, to
  # evaluation.every - 1; see docs/practice.md. The tasks of older groups are
  # put back, at most tasks.max_retries times in a row.
  config.rollout.max_staleness = 0
  config.rollout.max_concurrent = 64  # rollouts in progress at a time, >= 1
  # Whether samplers of other processes, which come and go, are looked for in
  # the bucket (experiments.replica); they have what publish.every publishes.
  config.rollout.replicas = False

  config.engine = ml_collections.ConfigDict()
  config.engine.num_slots = 64  # token streams of a policy; >= its open calls
  config.engine.context = 256  # tokens a slot holds, >= the roles' contexts
  config.engine.block = 32  # tokens of cache attended or skipped together
  config.engine.prefill_tokens = 1024  # of one prefill call, padding included
  config.engine.prefill_buckets = (16, 32, 64, 128)  # tokens, ascending
  config.engine.decode_steps = 8  # tokens decoded between host visits, >= 1
  # Busy slots that are decoded together, the idle ones left out, <= num_slots;
  # 0 decodes all at once, right where more rows cost nothing (TPU, GPU). On
  # CPUs 16 takes a third of the time where 25 of 128 are busy.
  config.engine.decode_rows = 0


def _add_method(config: ml_collections.ConfigDict) -> None:
  """Rewards, alignment, advantages and loss; functions by name."""
  config.reward = ml_collections.ConfigDict()
  config.reward.format = "well_formed"  # or answered; see grades.py
  config.reward.correct = "matches"  # or mentions: in a sentence; answers.py
  config.reward.mention_words = 40  # longest text that can mention, words, >= 1
  config.reward.opened_share = 0.5  # of the expert's grade; the report's: rest
  config.reward.correct_of = "root"  # or parent: whose correctness calls share
  # Tokens at the end of a context whose use costs, and what all of them cost.
  config.reward.overlong_tokens = 0  # >= 0; 0 for none
  config.reward.overlong_share = 1.0  # > 0

  config.alignment = ml_collections.ConfigDict()
  config.alignment.strategy = "duplicate_or_drop"  # mask, inverse_count
  config.alignment.num_slots = 8  # D, slots a sub role has; the paper's 8

  # per_task, mean_only, leave_one_out, other_rollouts, per_call_index,
  # per_batch, plain (none); for calls also per_block, inherit_parent,
  # per_subtask, beside which the root's are compared per_task
  config.advantage = "per_task"

  config.loss = ml_collections.ConfigDict()
  config.loss.ratio = "token"  # or sequence (the paper's), geometric
  config.loss.aggregation = "sequence_mean_token_mean"  # see losses.py
  config.loss.surrogate = "clipped"  # or dual_clipped, cispo
  config.loss.dual_floor = 3.0  # of dual_clipped, > 1 + clip_high
  config.loss.clip_low = 0.2  # ratio >= 1 - clip_low, in [0, 1]
  config.loss.clip_high = 0.2  # ratio <= 1 + clip_high, >= 0
  # On-policy, k1's gradient has mean zero: it does not regularise. k2's is the
  # gradient of the reverse KL, token by token.
  config.loss.kl = "none"  # or k1, k2, k3, against the reference
  config.loss.kl_coefficient = 0.0  # > 0 with a kl, 0 without
  config.loss.reference_every = 0  # of a stage's steps, then it moves; 0 never
  config.loss.entropy_coefficient = 0.0  # of the exact entropy, >= 0
  config.loss.importance = "token"  # none, sequence, sequence_rejection
  config.loss.importance_cap = 2.0  # on exp(old - sampler), >= 1
  config.loss.context_weight = 0.1  # imitation: unsampled tokens' share, >= 0

  config.critic = ml_collections.ConfigDict()  # PPO's; goes with plain
  config.critic.coefficient = 0.0  # of its error, >= 0; 0 for no critic
  config.critic.discount = 1.0  # gamma, in (0, 1]
  config.critic.trace = 0.95  # lambda, in [0, 1]
  config.critic.clip = 0.2  # how far a value moves in an update, > 0


def _add_optimisation(config: ml_collections.ConfigDict) -> None:
  """Batches and the optimizer."""
  config.batch = ml_collections.ConfigDict()
  config.batch.minibatches = 2  # optimizer steps a batch is split into, >= 1
  config.batch.rows = 16  # N, packed rows of a micro-batch, >= 1
  config.batch.row_tokens = 256  # T, tokens of a packed row
  config.batch.trajectories = 64  # M, trajectories of a micro-batch, >= 1
  # Sampled tokens of a packed row, at most; reinforcement computes logits for
  # so many. Fewer save the head's work where prompts and results are long.
  config.batch.row_targets = 0  # 0 for row_tokens
  # Tokens that trajectories of a row must begin with alike to have them in
  # common, at least; what reads no context (reinforcement, and imitation where
  # context_weight is 0) then computes them once.
  config.batch.least_shared = 0  # 0 shares none; 8 is little enough

  config.warmup_steps = 5  # updates of linear warm-up a stage, >= 0
  config.optimizer = ml_collections.ConfigDict()  # adamw
  config.optimizer.b1 = 0.9  # in [0, 1)
  config.optimizer.b2 = 0.99  # in [0, 1)
  config.optimizer.eps = 1e-8  # > 0
  config.optimizer.weight_decay = 0.0  # >= 0
  config.optimizer.clip_norm = 1.0  # of the global gradient, > 0


def _add_bookkeeping(config: ml_collections.ConfigDict) -> None:
  """Evaluations, checkpoints and published weights."""
  config.evaluation = ml_collections.ConfigDict()
  config.evaluation.every = 10  # steps between looks at dev, >= 1
  config.evaluation.tasks = 64  # dev questions a look, >= 1
  config.evaluation.final_tasks = 500  # at most; test, before and after
  config.evaluation.temperature = 0.0  # 0 is greedy, else >= 0.001
  config.evaluation.families = ()  # of questions; empty for all

  config.checkpoint = ml_collections.ConfigDict()
  config.checkpoint.every = 10  # steps, >= 1
  config.checkpoint.keep = 2  # checkpoints on disk, >= 1

  config.publish = ml_collections.ConfigDict()
  config.publish.bucket = ""  # URL of the store; empty: WORKDIR/bucket
  config.publish.every = 1  # steps, >= 1
  config.publish.keep = 3  # versions in the store, >= 1
  config.publish.dtype = "float32"  # bfloat16: half the bytes, rounded weights
  # Of how many versions one is whole, the others exact differences to it: fewer
  # bytes to write, and a copy of the weights in memory for it. 1: all; >= 1.
  config.publish.whole_every = 1

  config.jobs = ml_collections.ConfigDict()  # of one policy each, and replicas
  config.jobs.heartbeat = 5.0  # seconds between signs of life, 0.01 .. 3600
  # Seconds without one that are borne of another job; then this one ends. From
  # 3 heartbeats to 30 days (2,592,000).
  config.jobs.patience = 1800.0
