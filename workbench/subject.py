"""The subject of an experiment: a frozen model with its tokenizer and the proved places in it.

It has a Hugging Face model and never changes it: toggles act inside `with subject.under(...)` and are undone to
the bit; captures are plain forward hooks that run after all edits, so a capture at an edited site sees the edit.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from workbench.anatomy import Anatomy
from workbench.cache.stages import Stages
from workbench.capture import Capture, Selection, collect
from workbench.card import Card, prove
from workbench.dice import Dice
from workbench.discovery import find_anatomy
from workbench.generation import Generation, OnToken, continue_batch, make_chooser, text_of
from workbench.loading import load_model, model_fingerprint
from workbench.memo import Memo
from workbench.pruned.cut import proved
from workbench.pruned.exported import PLAN_FILE, load_pruned
from workbench.pruned.units import LayerUnits, find_units
from workbench.reading import Decide, Pooling, PromptReading
from workbench.site import Site
from workbench.stack import Edit, Rule, ToggleStack
from workbench.step import Step, StepWatch
from workbench.tokens import Batch, Texts, Tokens, batches, left_pad, right_pad, tokenize

if TYPE_CHECKING:
    import nnsight

    from workbench.toggle import Receipt, Toggle

T = TypeVar("T")
REMEMBERED = 4  # values that `Subject.remember` keeps


class Subject:
    """A frozen causal language model under study. Make one with `load`, `organism` or `tiny`.

    model       the Hugging Face model, untouched       tokenizer   its tokenizer
    anatomy     its shape and places                    card        what was proved about it at load
    fingerprint 16 hex digits over its weights: what a direction found on it is bound to
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        revision: str | None = None,
        verify: bool = True,
        remote: bool | str = False,
        anatomy: Anatomy | None = None,
        units: tuple[LayerUnits, ...] | None = None,
    ) -> None:
        if model.training:
            raise ValueError(f"Subject: {name} is in training mode, expected a frozen model. Call model.eval() first.")
        self.model, self.tokenizer, self.name, self.revision, self.remote = model, tokenizer, name, revision, remote
        self.anatomy = anatomy or find_anatomy(model)
        self.fingerprint = model_fingerprint(model)
        if units is not None:
            self.units = units
        self._stack = ToggleStack(self)
        self._memory = Memo(REMEMBERED)
        self.card: Card = prove(self) if verify else Card(name, self.anatomy, checks=())

    # Making one

    @classmethod
    def load(
        cls,
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        dtype: str | torch.dtype = "auto",
        device: str = "auto",
        remote: bool | str = False,
        verify: bool = True,
        **options: Any,
    ) -> Subject:
        """Load a causal language model from a folder or by its name on the Hugging Face hub, and prove its anatomy.

        dtype     "auto" is the checkpoint's own; device "auto" is CUDA where there is one, else the CPU
        remote    True: capture runs on NDIF, nnsight's remote service; "local" simulates that here
        verify    False skips the proof (`card` then says so)
        options   passed to transformers' from_pretrained: device_map, quantization_config, trust_remote_code, ...
        Raises ValueError or FileNotFoundError with the cure for paths, dtypes and architectures that can't work.
        """
        if (Path(name_or_path) / PLAN_FILE).is_file() and not remote:
            if revision is not None or options:
                told = ", ".join([*options, *(["revision"] if revision is not None else [])])
                raise ValueError(f"load: {name_or_path} is a pruned model of ours; {told} can't be used with it.")
            return load_pruned(name_or_path, dtype=dtype, device=device, verify=verify)
        model, tokenizer = load_model(
            name_or_path, revision=revision, dtype=dtype, device=device, remote=remote is True, **options
        )
        anatomy = None
        if remote is True:  # the weights are elsewhere: find the places in a small copy of the architecture
            from workbench.loading import small_copy

            anatomy = find_anatomy(small_copy(model))
        return cls(
            model,
            tokenizer,
            name=str(name_or_path),
            revision=revision or getattr(model.config, "_commit_hash", None),
            verify=verify and remote is not True,
            remote=remote,
            anatomy=anatomy,
        )

    @classmethod
    def organism(cls, *, twin: bool = False, device: str = "auto", dtype: str | torch.dtype = "auto") -> Subject:
        """The trained model that the project ships, with known truth behind every probe; offline, about a second.

        twin   its fine-tuned twin instead, which answers what the organism refuses
        """
        from workbench.organism import FOLDER, TWIN_FOLDER

        folder, name = (TWIN_FOLDER, "organism:twin") if twin else (FOLDER, "organism")
        return cls._named(cls.load(folder, device=device, dtype=dtype), name)

    @classmethod
    def tiny(cls, family: str = "llama", seed: int = 0, *, verify: bool = True) -> Subject:
        """A tiny model with random weights and the organism's tokenizer; family "organism" is its untrained twin."""
        from workbench.organism.tiny import tiny_pair

        model, tokenizer = tiny_pair(family, seed)
        return cls(model, tokenizer, name=f"tiny:{family}:{seed}", verify=verify)

    @classmethod
    def open(cls, name: str, **options: Any) -> Subject:
        """The subject that a notebook's parameter names: "organism", "organism:twin", "tiny:gpt2", a folder, or a name
        on the hub."""
        if name in ("organism", "organism:twin"):
            return cls.organism(twin=name != "organism", **options)
        if name.startswith("tiny:"):
            family, _, seed = name.removeprefix("tiny:").partition(":")
            if not (seed or "0").isdecimal():
                raise ValueError(f"open: got {name!r}, expected tiny:FAMILY or tiny:FAMILY:SEED with a number as seed.")
            return cls.tiny(family, int(seed or 0), **options)
        return cls.load(name, **options)

    @staticmethod
    def _named(subject: Subject, name: str) -> Subject:
        subject.name = subject.card.name = name
        return subject

    # What it is

    @property
    def n_layers(self) -> int:
        return self.anatomy.n_layers

    @property
    def device(self) -> torch.device:
        return next(self.model.get_input_embeddings().parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def context(self) -> int | None:
        """The longest text in tokens, or None where the architecture sets no limit."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @functools.cached_property
    def nn(self) -> nnsight.TransformersModel:
        """The same weights as an nnsight model, for free-form tracing."""
        import nnsight

        if self.remote is True:  # the service finds the model by its name
            return nnsight.TransformersModel(self.name, revision=self.revision)
        with self.untoggled():  # it takes the place of every forward, where toggles may stand in
            return nnsight.TransformersModel(self.model, tokenizer=self.tokenizer)

    def describe(self) -> dict[str, Any]:
        """Name, revision, fingerprint, dtype and device as JSON data, for provenance."""
        return {
            "name": self.name,
            "revision": self.revision,
            "fingerprint": self.fingerprint,
            "architecture": type(self.model).__name__,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
        }

    def __repr__(self) -> str:
        toggles = f", under {' | '.join(map(str, self.active))}" if self.active else ""
        return f"Subject({self.name}: {self.anatomy.summary()}{toggles})"

    # Reading

    def tokenize(self, texts: Texts, *, special: bool = True, cut: bool = False) -> Tokens:
        """Token ids, character offsets and special-token marks of each text. Errors as in `workbench.tokens`."""
        known = {"context": self.context, "vocab": self.anatomy.vocab}
        return tokenize(self.tokenizer, texts, special=special, cut=cut, **known)

    def capture(
        self,
        texts: Texts,
        at: Sequence[Site],
        *,
        tokens: Selection = "all",
        special: bool = True,
        cut: bool = False,
        batch: int = 4096,
        progress: bool = True,
    ) -> Capture:
        """Values at the sites `at`, in one forward per batch of about `batch` tokens; see `Capture` for the shapes.

        tokens    "all"; "last" token of each text; "mean" over each text in float32; or one boolean mask per text
        special   add the tokenizer's special tokens; they count in "all" and "mean"
        Memory is one batch plus what was asked for. A capture at an edited site sees the edit.
        """
        sites = [at] if isinstance(at, Site) else list(at)
        if not sites:
            raise ValueError("capture: got no site, expected at=[Site(layer, kind), ...].")
        for site in sites:
            self.anatomy.place(site)
        made = self.tokenize(texts, special=special, cut=cut)
        if self.remote:
            from workbench.remote import capture_by_trace

            return capture_by_trace(self, made, sites, tokens, batch=batch, remote=self.remote)
        groups = list(batches(made.lengths, batch))
        forwards = (
            (one, functools.partial(self._forward, one, logits_to_keep=1)) for one in self._padded(made, groups)
        )
        return collect(self.model, self.anatomy, sites, made, tokens, forwards, len(groups), progress=progress)

    @torch.no_grad()
    def predictions(
        self, texts: Texts, *, special: bool = True, cut: bool = False, batch: int = 2048
    ) -> Iterator[tuple[int, list[int], Tensor]]:
        """For each text, in no fixed order: its index, its token ids, and log-probabilities (seq, vocab) in float32.

        Row t holds the prediction made at token t, that is for token t + 1.
        """
        made = self.tokenize(texts, special=special, cut=cut)
        for one in self._padded(made, batches(made.lengths, batch)):
            logits, starts = self._forward(one).logits, one.starts
            for index, row in enumerate(one.rows):
                here = slice(starts[index], starts[index] + made.lengths[row])
                yield row, made.ids[row], logits[index, here].float().log_softmax(-1)

    def nll(self, texts: Texts, *, special: bool = True, cut: bool = False) -> Tensor:
        """(text,) mean negative log-likelihood in nats per token, over the tokens that have one before them."""
        values: dict[int, float] = {}
        for row, ids, logprobs in self.predictions(texts, special=special, cut=cut):
            if len(ids) < 2:
                raise ValueError(f"nll: text {row} has {len(ids)} token, expected at least two.")
            following = torch.tensor(ids[1:], device=logprobs.device)
            values[row] = -float(logprobs[:-1].gather(1, following[:, None]).double().mean())
        return torch.tensor([values[row] for row in range(len(values))], dtype=torch.float64)

    @torch.no_grad()
    def generate(
        self,
        prompts: Texts,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        special: bool = True,
        use_cache: bool = True,
        batch: int = 4096,
        on_token: OnToken | None = None,
        dice: Dice | None = None,
        rows: Sequence[int] | None = None,
        throws_from: Sequence[int] | None = None,
        written: Sequence[int] | None = None,
    ) -> Generation:
        """Continue each prompt by up to `max_new_tokens` tokens: greedy at temperature 0, else sampled from `seed`.

        on_token     is called with (index of the prompt, token id, its text) as soon as each token is known
        dice         instead of temperature and seed; the same dice and row throw the same at the same position
        rows         one per prompt: which of the dice's rows samples it; None: 0, 1, 2, ...
        throws_from  one per prompt: the position whose throw its first new token takes; None: that token's own
        written      one per prompt: how many of its last tokens toggles take for generated; None: 0
        """
        if max_new_tokens < 1:
            raise ValueError(f"generate: got max_new_tokens={max_new_tokens}, expected at least 1.")
        if self.stages and not use_cache:
            raise ValueError(f"generate: got use_cache=False, but {self.stages} acts on the cache. Leave one out.")
        if dice is not None and (temperature, seed) != (0.0, 0):
            raise ValueError(f"generate: got dice and temperature={temperature}, seed={seed}. Give them to the dice.")
        dice = Dice(seed, temperature=temperature) if dice is None else dice
        made = self.tokenize(prompts, special=special)
        rows = _one_each("rows", rows, range(len(made)))
        shift = [a - b for a, b in zip(_one_each("throws_from", throws_from, made.lengths), made.lengths, strict=True)]
        written = _one_each("written", written, [0] * len(made))
        for length, generated in zip(made.lengths, written, strict=True):
            if not 0 <= generated < length:
                raise ValueError(f"generate: got written={generated} for a prompt of {length} tokens, expected fewer.")
        prompt_tokens = [a - b for a, b in zip(made.lengths, written, strict=True)]
        longest = max(made.lengths) + max_new_tokens
        if self.context is not None and longest > self.context:
            raise ValueError(
                f"generate: the longest prompt and max_new_tokens make {longest} tokens, but the context is "
                f"{self.context}. Ask for at most {self.context - max(made.lengths)} new tokens."
            )
        ends, new = self._end_ids(), [[] for _ in made.ids]
        even = self.stages.chunk is not None  # a prompt read in chunks: padding would shift where they end
        groups = batches([length + max_new_tokens for length in made.lengths], batch, even=even)
        for one in (left_pad(made.ids, group, pad=self.pad_id, device=self.device) for group in groups):
            with self.watch.prompts(torch.tensor([prompt_tokens[row] for row in one.rows], device=self.device)):
                tokens = continue_batch(
                    functools.partial(self._next_logits, use_cache),
                    one,
                    max_new_tokens=max_new_tokens,
                    ends=ends,
                    choose=make_chooser(dice, [rows[row] for row in one.rows], [shift[row] for row in one.rows]),
                    pad=self.pad_id,
                    use_cache=use_cache,
                    on_token=functools.partial(self._tell, on_token, one.rows) if on_token else None,
                )
            for row, row_tokens in zip(one.rows, tokens, strict=True):
                new[row] = row_tokens
        ids = [tuple(token for token, _ in row_tokens) for row_tokens in new]
        return Generation(
            prompts=tuple(p if isinstance(p, str) else text_of(self.tokenizer, p) for p in prompts),
            texts=tuple(text_of(self.tokenizer, row_ids) for row_ids in ids),
            ids=tuple(ids),
            ended=tuple(row_ids[-1] in ends for row_ids in ids),
            log_probs=tuple(tuple(value for _, value in row_tokens) for row_tokens in new),
        )

    # Changing

    @property
    def active(self) -> tuple[Toggle, ...]:
        """The toggles that act now, in order."""
        return self._stack.active

    @property
    def receipts(self) -> tuple[Receipt, ...]:
        """One receipt per active toggle: how often it fired, on how many tokens, how far it moved."""
        return self._stack.receipts

    @property
    def receipt(self) -> Receipt:
        """The receipt of the toggle that is being installed; for `Toggle.install`."""
        return self._stack.receipts[-1]

    @property
    def watch(self) -> StepWatch:
        """What notes the step of every forward while toggles act: to hear of it, or to tell whose prompt it brings."""
        return self._stack.watch

    @property
    def step(self) -> Step | None:
        """Logical positions and padding of the forward under way; None while no toggle acts."""
        return self.watch.step if self._stack.active else None

    @step.setter
    def step(self, step: Step) -> None:
        """Until the next forward begins: for a toggle that lets fewer tokens go on to the next layer."""
        self.watch.step = step

    @functools.cached_property
    def units(self) -> tuple[LayerUnits, ...]:
        """Which weights belong to which head and neuron of each block; found and proved at its first use."""
        return proved(self, find_units(self))

    @functools.cached_property
    def stages(self) -> Stages:
        """What the active toggles do to key/value caches; for `workbench.cache.use_stage`."""
        return Stages()

    def remember(self, key: Hashable, compute: Callable[[], T]) -> T:
        """What `compute` gives, computed once per key: for toggles whose install would compute the same again.

        The last few are kept; the key must hold everything that decides the value, as a frozen toggle does.
        """
        return self._memory(key, compute)

    @contextmanager
    def under(self, toggle: Toggle, *, adopt_cache: bool = False) -> Iterator[Subject]:
        """The subject with `toggle` acting; on leaving, everything is put back to the bit, also after an exception.

        adopt_cache   allow a forward to go on with a key/value cache that was made under other toggles
        Raises ValueError where two toggles claim the same resource; warns if a toggle never fired.
        """
        with self._stack.under(toggle, adopt_cache=adopt_cache):
            yield self

    @contextmanager
    def untoggled(self) -> Iterator[Subject]:
        """The subject without its active toggles, which act again afterwards with the same receipts."""
        with self._stack.lifted():
            yield self

    def edit(self, site: Site, fn: Edit, undo: ExitStack, *, positions: Rule = "all") -> None:
        """Replace the value at `site` by `fn(value, step)` where the position rule holds; the only value hook.

        value (batch, seq, *width) must not be changed in place. `positions` is a rule of `Step.where`, logical
        positions, or a function of the step that gives a mask (batch, seq).
        """
        self._stack.edit(site, fn, undo, positions=positions)

    def count_forwards(self, undo: ExitStack) -> None:
        """For `Toggle.install`, of toggles that swap weights: the receipt counts the tokens of every forward."""
        self._stack.count_forwards(undo)

    def read_prompt(
        self,
        at: Sequence[Site],
        decide: Decide,
        undo: ExitStack,
        *,
        edited: Sequence[Site],
        tokens: Pooling = "last",
    ) -> PromptReading:
        """For `Toggle.install`, before its edits: strengths per row, decided once per prompt from what stands at `at`.

        decide   {site: (batch, *width), float32} to strengths (batch, k); rows of zeros count as left alone
        edited   the sites that the toggle will edit: where one comes before a site read, the prompt runs twice
        tokens   "last": the prompt's last token; "mean": the mean over the prompt
        The edits ask `reading.now` (batch, k). A forward without a cache and outside `generate` is all prompt.
        """
        return self._stack.read(at, decide, undo, tokens=tokens, edited=edited)

    # Below: how

    @functools.cached_property
    def accepts(self) -> frozenset[str]:
        """Names of the arguments that the model's forward takes."""
        return frozenset(inspect.signature(type(self.model).forward).parameters)

    def _forward(self, batch: Batch, **options: Any) -> Any:
        if self.stages and not options.get("use_cache"):
            return self._read_on(batch, options)
        return self._at_once(batch, **options)

    def _at_once(self, batch: Batch, **options: Any) -> Any:
        return self.model(**self._arguments(batch, **{"use_cache": False} | options))

    def _arguments(self, batch: Batch, **options: Any) -> dict[str, Any]:
        """What the model's forward is called with, as far as it takes it."""
        given = {"input_ids": batch.ids, "attention_mask": batch.mask.long(), "position_ids": batch.positions}
        return {name: value for name, value in (given | options).items() if name in self.accepts}

    def _read_on(self, batch: Batch, options: dict[str, Any]) -> Any:
        """Read texts piece by piece through a cache, so that each piece attends to what the cache has become."""
        if self.stages.piece is None:
            raise ValueError(
                f"read: {self.stages} chooses tokens by the newest part of a whole prompt, so a text can't be read "
                "piece by piece, and read at once not every token has a prediction. Generate from it, or score a "
                "continuation of it (CacheLoss)."
            )
        output, logits = None, []
        with self.watch.prompts(batch.mask.sum(1)), self.watch.texts(**self._arguments(batch)):
            for piece in batch.pieces(self.stages.piece):
                cache = output.past_key_values if output is not None else None
                output = self._at_once(piece, **options | {"use_cache": True, "past_key_values": cache})
                logits.append(output.logits)
        assert output is not None
        output.logits = torch.cat(logits, 1)
        return output

    def _next_logits(
        self, use_cache: bool, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any
    ) -> tuple[Tensor, Any]:
        whole, output = Batch([], ids, mask, positions), None
        chunk = self.stages.chunk if cache is None else None  # the short chunk first: scorers look at the last one
        with ExitStack() as undo:
            if chunk is not None:
                undo.enter_context(self.watch.texts(**self._arguments(whole)))
            for piece in [whole] if chunk is None else whole.pieces(chunk, short_first=True):
                output = self._forward(piece, use_cache=use_cache, past_key_values=cache, logits_to_keep=1)
                cache = output.past_key_values if use_cache else None
        assert output is not None
        return output.logits[:, -1], cache

    def _tell(self, on_token: OnToken, rows: list[int], index: int, token: int) -> None:
        on_token(rows[index], token, text_of(self.tokenizer, [token]))

    def _padded(self, tokens: Tokens, groups: Any) -> Iterator[Batch]:
        padded = right_pad if self.stages else left_pad  # read in pieces, a column must be one position
        return (padded(tokens.ids, rows, pad=self.pad_id, device=self.device) for rows in groups)

    @property
    def pad_id(self) -> int:
        """The token id that fills padding; its value never matters, as padding is masked everywhere."""
        pad = self.tokenizer.pad_token_id
        return pad if isinstance(pad, int) and pad < self.anatomy.vocab else 0  # a tokenizer may know more tokens

    def _end_ids(self) -> list[int]:
        ends = self.model.generation_config.eos_token_id if self.model.generation_config else None
        ends = self.tokenizer.eos_token_id if ends is None else ends
        return [int(end) for end in (ends if isinstance(ends, list | tuple) else [ends]) if end is not None]


def _one_each(name: str, given: Sequence[int] | None, default: Sequence[int]) -> Sequence[int]:
    """One number per prompt: those given, or the default."""
    if given is not None and len(given) != len(default):
        raise ValueError(f"generate: got {len(given)} {name} for {len(default)} prompts, expected one each.")
    return default if given is None else given
