"""A training stage: the Hugging Face `Trainer` turns the wheel, the session does what the recipe says.

Everything the Trainer brings (accumulation, schedules of the learning rate, resume, logging, accelerate) stays its own;
the session is driven from a callback, once per optimizer step. The session's state lies inside each Trainer checkpoint
and, being written last, marks it as whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, TrainerControl, TrainerState

from ..errors import ModelError
from ..modifiers.distillation.teacher import model_inputs
from ..modifiers.schedule import to_step
from ..progress import Progress
from .durable import sync_tree, write_whole
from .examples import Examples, ExampleStream, collate
from .heap import kept_heap
from .lora import adapters
from .processes import Processes
from .reporters import reporters

if TYPE_CHECKING:
    from ..modifiers import Masks, Session
    from ..recipes import TrainingConfig

SESSION_STATE = "session.pt"
CHECKPOINTS_PER_STAGE = 10  # when the recipe gives no `save_steps`
LARGEST_GRADIENT_NORM = 1.0  # gradients are scaled down to it, after the masks have been applied


def run_training(
    session: Session,
    config: TrainingConfig,
    examples: Examples | ExampleStream,
    work: Path,
    progress: Progress | None = None,
    logs: Path | None = None,
) -> list[dict[str, float]]:
    """Train `session.model` in place and return the log, one entry per optimizer step.

    logs: where `report_to: [tensorboard]` writes; None: into `work`. Continues from the last whole checkpoint in
    `work`; the result then is bit for bit that of an uninterrupted run.
    """
    processes = Processes.join()
    batch = config.batch_size * processes.count
    steps_per_epoch = math.ceil(math.ceil(len(examples) / batch) / config.gradient_accumulation)
    total = to_step(config.epochs, steps_per_epoch)
    if config.max_steps is not None:
        total = min(total, config.max_steps)
    checkpoint = last_checkpoint(work)
    arguments = _arguments(config, total, work)
    # On several GPUs the Trainer would use DataParallel, whose loss is a vector; torchrun uses them all.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    driver = SessionDriver(session, steps_per_epoch, checkpoint, progress, processes)
    with (
        kept_heap(),
        own_forward(session.model),
        adapters(session.model, config.lora, session.masks, config.seed),
    ):
        trainer = SessionTrainer(
            session,
            processes,
            args=arguments,
            train_dataset=examples,
            data_collator=partial(collate, pad=_padding(session)),
            callbacks=[
                driver,
                *(reporters(config.report_to, logs or work) if processes.is_first else ()),
            ],
        )
        driver.trainer = trainer
        trainer.remove_callback(PrinterCallback)
        _recompute_activations(session.model, config.gradient_checkpointing)
        if checkpoint and _step(checkpoint) >= total:
            # Killed between the last step and its result: the Trainer would make one step more.
            trainer._load_from_checkpoint(str(checkpoint))
            trainer.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
            driver.begin(total)
            session.finish()
        else:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        _recompute_activations(session.model, False)
    session.model.eval()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@contextmanager
def own_forward(model: torch.nn.Module) -> Iterator[None]:
    """Afterwards the model's forward is what it was: for bf16, accelerate puts one with autocast in its place."""
    names = ("forward", "_original_forward")
    before = {name: vars(model)[name] for name in names if name in vars(model)}
    try:
        yield
    finally:
        for name in names:
            vars(model).pop(name, None)
        vars(model).update(before)


def check_packing(model: Any) -> None:
    """ModelError if the model mixes up two sequences in one row, which it should tell apart by their positions."""
    length = 8
    ids = torch.arange(2 * length, device=model.device)[None] % model.config.vocab_size
    positions = torch.arange(length, device=model.device).repeat(2)[None]
    with torch.inference_mode():
        together = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, length:]
        alone = model(input_ids=ids[:, length:], use_cache=False).logits
    if not torch.allclose(together, alone, rtol=1e-3, atol=1e-3 * float(alone.abs().max())):
        raise ModelError(
            f"packing: {type(model).__name__} lets a sequence see those before it in its row; remove packing"
        )


def last_checkpoint(work: Path) -> Path | None:
    """The newest Trainer checkpoint in `work` that was written to its end."""
    whole = [file.parent for file in work.glob(f"checkpoint-*/{SESSION_STATE}")]
    return max(whole, key=_step, default=None)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


class SessionTrainer(Trainer):
    """A Trainer whose loss goes through the session."""

    def __init__(self, session: Session, processes: Processes, **options: Any) -> None:
        super().__init__(model=session.model, **options)
        self.session = session
        self.processes = processes
        # Every part of the loss is a mean over its micro-batch, and the Trainer averages these means. (Models that
        # divide by the tokens of all micro-batches would weigh cross entropy differently from distillation.)
        self.model_accepts_loss_kwargs = False
        self.held = HeldZeros(session.masks)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        outputs = model(**model_inputs(inputs), labels=inputs["labels"], use_cache=False)
        with self.accelerator.autocast():  # a teacher computes as the model does
            loss = self.session.loss(outputs.loss, inputs, outputs)
        if not torch.isfinite(loss):
            raise ModelError(
                f"the loss is {float(loss.detach())} at optimizer step {self.session.step}; lower learning_rate, or add"
                " warmup_steps (what was saved before is kept: the run goes on from it)"
            )
        return (loss, outputs) if return_outputs else loss

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> None:
        """The driver logs it, of the gradients that remain once those of held zeros are gone."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Numbers that modifiers logged since the last time go into the same entry, and the share of held zeros."""
        held = {"sparsity": self.held.share()} if len(self.session.masks) else {}
        parts = self.processes.mean(self.session.take_logs())
        super().log({**logs, **parts, **held}, start_time)


class HeldZeros:
    """Counts them; a mask that has not changed since is not counted again."""

    def __init__(self, masks: Masks) -> None:
        self.masks = masks
        self._counted: dict[str, tuple[torch.Tensor, int]] = {}

    def share(self) -> float:
        """Of all weights of the matrices that have any mask."""
        kept = size = 0
        for name, mask in self.masks.items():
            last = self._counted.get(name)
            if last is None or last[0] is not mask:
                self._counted[name] = last = (mask, int(mask.sum()))
            kept += last[1]
            size += mask.numel()
        return 1 - kept / size


class SessionDriver(TrainerCallback):
    """Calls the session's training methods at the Trainer's optimizer steps."""

    def __init__(
        self,
        session: Session,
        steps_per_epoch: int,
        checkpoint: Path | None,
        progress: Progress | None,
        processes: Processes,
    ) -> None:
        self.session = session
        self.processes = processes
        self.steps_per_epoch = steps_per_epoch
        self.checkpoint = checkpoint
        self.progress = progress
        self.trainer: SessionTrainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.begin(state.max_steps)

    def begin(self, total: int) -> None:
        """Start the session's clock, where the checkpoint was if there is one."""
        self.session.begin(self.steps_per_epoch, total)
        if self.checkpoint is not None:
            # Each process has a device of its own; what belongs beside a weight goes there when it is used.
            saved = torch.load(
                self.checkpoint / SESSION_STATE, map_location="cpu", weights_only=True
            )
            self.session.load_state_dict(saved)
        self.session.to(self.session.device)  # masks to where the Trainer has put the weights

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.session.before_step()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.session.before_optimizer(kwargs["optimizer"])
        # Here and not in the Trainer, which would count gradients of weights that are held at zero.
        parameters = self.session.model.parameters()
        norm = self.trainer.accelerator.clip_grad_norm_(parameters, LARGEST_GRADIENT_NORM)
        self.session.log("grad_norm", norm)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.session.after_step(kwargs["optimizer"])

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.processes.wait()  # each has put its random state there
        if not self.processes.is_first:
            return
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        sync_tree(folder)
        saved = self.session.state_dict()
        write_whole(folder / SESSION_STATE, lambda file: torch.save(saved, file))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.session.finish()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.progress and logs and "loss" in logs:
            note = f"loss {logs['loss']:.3f}"
            if "sparsity" in logs:
                note += f", {logs['sparsity']:.0%} zeros"
            self.progress("train", state.global_step, state.max_steps, note)


def _arguments(config: TrainingConfig, total: int, work: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(work),
        max_steps=total,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        max_grad_norm=0.0,  # the driver clips
        bf16=config.bf16,
        use_cpu=not (torch.cuda.is_available() or torch.backends.mps.is_available()),
        seed=config.seed,
        save_strategy="steps",
        save_steps=config.save_steps or math.ceil(total / CHECKPOINTS_PER_STAGE),
        # Two, for the older is still whole while the newer is being written.
        save_total_limit=2,
        logging_steps=1,
        logging_nan_inf_filter=False,  # a loss that is no number shall be seen, not replaced
        report_to="none",  # `reporters` gives the callbacks
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        # Of several processes each reads a stream and takes its part: batches of unequal width can't be passed around.
        accelerator_config={"dispatch_batches": False},
    )


def _recompute_activations(model: Any, on: bool) -> None:
    """Gradient checkpointing, by the model's own method: Trainer and model change its name in transformers 5."""
    new = hasattr(model, "activation_checkpointing_enable")
    kind = "activation" if new else "gradient"
    if on != bool(getattr(model, f"is_{kind}_checkpointing", False)):
        getattr(model, f"{kind}_checkpointing_{'enable' if on else 'disable'}")()


def _padding(session: Session) -> int:
    tokenizer = session.tokenizer
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0
