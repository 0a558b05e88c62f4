"""Levels on gradients: one torch optimizer that runs any level or stack."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import is_
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from nestopt.config.spec import build
from nestopt.core.gates import bind
from nestopt.core.inputs import INPUTS
from nestopt.core.level import Level
from nestopt.core.part import plain
from nestopt.optim import checkpoint, checks, weights
from nestopt.optim.cycled import cycled
from nestopt.optim.execute.capturable import begin_on_device, step_capturable
from nestopt.optim.execute.update import UpdateSettings
from nestopt.optim.explain import Explanation, explain
from nestopt.optim.layer_inputs.sums import Totals
from nestopt.optim.layer_inputs.uses import Scale
from nestopt.optim.layer_inputs.watcher import Seen, Watcher, levels_of, shown
from nestopt.optim.metrics import Recorder, finite, memory_norms
from nestopt.optim.options import OPTIONS, OnNonfinite, StepOptions
from nestopt.optim.plan import Plan, alike, check_capturable_group


class Nested(weights.Weighted, Optimizer):
    r"""Runs a level, or a stack of them, on the gradients of parameters.

    $$W \leftarrow (1 - \mathrm{lr}\cdot\lambda)\,W - \mathrm{lr}\cdot u, \qquad u = \mathrm{stack}(g)$$

    It is a `torch.optim.Optimizer`: parameter groups, schedulers, closures, hooks and checkpoints work as there. State
    is in `state[p]` under readable keys (`"fast.momentum"`), in float32 or wider; `state_dict()` is plain tensors,
    numbers and strings. `nestopt.optimizer` builds one from a model and decides which parameters get the stack.

    Args:
        params: parameters, named parameters, or groups of either. A group may have its own `stack` (a level or a spec
            of one), `lr`, `weight_decay`, `period` and `maximize`. In `momentum`, None at first, torch's schedulers
            (`OneCycleLR`, `CyclicLR`) put the β of the stack's fastest average of gradients.
        stack: the level, or a spec of one (a name, a mapping, a list for a chain).
        lr: step size, a number or a tensor of one element, of which each further group gets a copy. Default 1e-3.
        weight_decay: λ above. Default 0.
        coupled: add λW to the gradient instead of taking it off the weights (L2 regularisation). Default False.
        period: on a group, accumulate gradients (their sum) and step once in so many calls; parameters stay as they
            are in between (NL eq. 71). Default 1.
        maximize: ascend instead. Default False.
        on_nonfinite: what to do about a gradient with an infinity or a NaN: `"ignore"` it (default, as torch does),
            `"skip"` the whole step, or `"raise"`. The latter two look at every gradient first, and wait for the device.
            `shampoo` and `matrix_adagrad` raise on the CPU in any case, and else leave such a matrix as it is.
        capturable: keep step counts on the device, and let no value decide what is done: such a step can be traced by
            `torch.compile` and captured in a CUDA graph. Give `lr` as a tensor, or each new value is compiled anew.
        compile: run each elementwise stack as one kernel, compiled at the first step (which takes a while; a C++
            compiler is needed on the CPU). Other levels run as they do without.
        metrics: have the levels report at every step (see `metrics`), tensor by tensor and so more slowly.

    Raises:
        ValueError: a value out of range, a level of matrices (muon) given a parameter that is none, a parameter that
            is complex, or that comes twice.
    """

    renamed: ClassVar[dict[str, str]] = {}
    """State keys of torch's optimizer of the same name, and ours: its checkpoints load here."""

    takes_complex: ClassVar[bool] = False
    """Whether it steps complex parameters, as torch's of the same name does."""

    seed: int | None = None
    """What starts at random is drawn from this and the parameter's name; None: the seed that torch was given last."""

    def __init__(
        self,
        params: Iterable[Any],
        stack: Any = "gd",
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.0,
        *,
        coupled: bool = False,
        period: int = 1,
        maximize: bool = False,
        on_nonfinite: OnNonfinite = "ignore",
        capturable: bool = False,
        compile: bool = False,
        metrics: bool = False,
    ) -> None:
        stack = build("level", stack, "stack")
        self._start_with(locals())

    def _start_with(self, given: Mapping[str, Any], **more: Any) -> None:
        """Start with the arguments of an `__init__` (its `locals()`): step options, and the settings of groups."""
        options = {key: given[key] for key in OPTIONS if key in given}
        settings = {key: value for key, value in given.items() if key not in ("self", "params", *OPTIONS)}
        self._start(given["params"], settings | more, StepOptions(**options))

    def _start(self, params: Iterable[Any], defaults: dict[str, Any], options: StepOptions) -> None:
        self.options = options
        self._settle()
        checks.check_ordered(params)
        defaults = {key: plain(value) for key, value in defaults.items()}
        if not defaults.keys() & {"momentum", "betas"}:
            defaults["momentum"] = None
        super().__init__(params, defaults)

    def like(self, groups: Iterable[Any], seed: int) -> Nested:
        """Make an optimizer of the same kind for other parameter groups; what these do not say is as here.

        A state that starts at random is drawn from `seed` and the name of the parameter.
        """
        other = object.__new__(type(self))
        other.__dict__.update({k: v for k, v in self.__getstate__().items() if k not in Optimizer.__getstate__(self)})
        other.seed = seed
        other._start(groups, self.defaults, self.options)
        return other

    def _settle(self) -> None:
        """Forget what is worked out anew after loading, unpickling or copying."""
        self._recorder = Recorder() if self.options.metrics else None
        note = self._recorder.note if self._recorder is not None else None
        compiled, seed = self.options.compile, self.seed
        self._plan = Plan(self.complete, self._accept, self._totals, note, compiled=compiled, seed=seed)
        self._accepted: set[int] = set()
        self._watcher: Seen | None = None
        self._model: weakref.ref[nn.Module] | None = None
        self._unseen: list[str] | None = []  # None once a step has said so
        self._skipped = 0
        self._evaluates = weights.evaluates(self.__dict__.get("state", {}))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch; it may have its own `stack`. Nothing is added if anything in it is wrong.

        Where the others have names, parameters without are called as the model calls them, or by their places.
        """
        param_group = {key: value if key == "params" else plain(value) for key, value in param_group.items()}
        checks.check_ordered(param_group["params"])
        model = self._model() if self._model is not None else None
        param_group = checks.named_as(self.param_groups, param_group, model)
        group = {**self.defaults, **param_group}
        if "stack" in group:
            group["stack"] = build("level", group["stack"], f"param_groups[{len(self.param_groups)}].stack")
            param_group["stack"] = group["stack"]
        lr = group["lr"]
        if isinstance(lr, Tensor) and any(lr is other["lr"] for other in self.param_groups):
            param_group["lr"] = lr.detach().clone()  # a schedule writes each group's own value into its tensor
        checks.check_group(group)
        index = len(self.param_groups)
        super().add_param_group(param_group)
        added = self.param_groups[index]
        try:
            level = self.level(added)
            checks.check_parameters(added, index, level, takes_complex=self.takes_complex)
            if INPUTS in level.needs:
                checks.check_inputs(added, level, capturable=self.options.capturable)
            weights.check_levels(list(map(self.level, self.param_groups)), capturable=self.options.capturable)
            if self.options.capturable:
                check_capturable_group(added, index, level)
        except Exception:
            self.param_groups.pop()
            raise
        self._accepted.update(map(id, added["params"]))
        if isinstance(watcher := self.__dict__.get("_watcher"), Watcher):
            watcher.add(dict.fromkeys(added["params"], level))

    def _accept(self, level: Level, param: Tensor, name: str) -> None:
        """Raise RuntimeError for what an engine has put in the place of a parameter whose shape `level` must see."""
        if id(param) not in self._accepted:
            raise RuntimeError(
                f"{level.label} must see tensors in their true shape, and a tensor of shape {list(param.shape)} has "
                f"come in the place of {name}: DeepSpeed's ZeRO puts flat slices of many parameters there. Use "
                "nestopt.train.deepspeed.initialize, or add_param_group for a parameter of that shape"
            )

    @property
    def count_device(self) -> str | None:
        """Return where step counts are; None: beside their parameters."""
        return None if self.options.capturable else "cpu"

    def level(self, group: dict[str, Any]) -> Level:
        """Return the level that a parameter group runs."""
        momentum = group.get("momentum")
        return group["stack"] if momentum is None else cycled(group["stack"], momentum)

    def coupled(self, group: dict[str, Any]) -> bool:
        """Return whether a group's weight decay is added to the gradient (L2) instead of taken off the weights."""
        return group.get("coupled", False)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every parameter that has a gradient; others, and their state, are not touched.

        Args:
            closure: computes the loss anew and returns it, as in torch.

        Raises:
            RuntimeError: a gradient is sparse, of another shape than its parameter, or, with `on_nonfinite="raise"`,
                not finite. Nothing has been changed then.
        """
        if self._evaluates:
            raise RuntimeError("the parameters hold the weights to evaluate with; call optimizer.train() before a step")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.options.capturable:
            self._step_capturable()
            return loss
        grads = [[param.grad for param in group["params"]] for group in self.param_groups]
        if self.options.on_nonfinite != "ignore" and not finite(grads):
            if self.options.on_nonfinite == "raise":
                checks.raise_nonfinite(self.param_groups, grads)
            self._skipped += 1
            return loss
        levels = [self.level(group) for group in self.param_groups]
        if not self._is_settled(levels, grads):
            self._plan.settle(self.param_groups, [bind(level, step=None) for level in levels], grads, self.state)
        elif self._plan.breakable:
            checks.check_finite(self.param_groups, levels, grads)
        if self._recorder is not None:
            self._recorder.clear()
        asking = None
        for group, share, own in zip(self.param_groups, self._plan.shares, grads, strict=True):
            settings = self._update_settings(group)
            for executor in share.executors:
                executor.step(share.level, [own[place] for place in executor.places], settings)
                asking = share.level if executor.inputs is not None else asking
            if share.of_weights:
                weights.after_step(share.level, group, share.executors, settings.lr, self._comm)
        if asking is not None and self._unseen is not None:
            unseen, self._unseen = self._unseen, None
            if self._watcher is None:
                unseen = ["all its parameters (no model is watched)"]
            if unseen:
                checks.warn_unseen(asking, unseen)
        return loss

    def _is_settled(self, levels: Sequence[Level], grads: Sequence[Sequence[Tensor | None]]) -> bool:
        """Return whether nothing but numbers has changed since the plan was made."""
        shares, known = self._plan.shares, self._plan.known
        if len(shares) != len(levels) or len(known) != len(self.state) or not all(map(is_, self.state.values(), known)):
            return False
        for share, level, group, own in zip(shares, levels, self.param_groups, grads, strict=True):
            if share.ids != list(map(id, group["params"])):
                return False
            if share.forms != [None if grad is None else (grad.shape, grad.layout) for grad in own]:
                return False
            if level is not share.level:
                bound = bind(level, step=None)
                if not alike(bound, share.level):
                    return False
                share.level = bound
        return all(executor.intact() for share in shares for executor in share.executors)

    def _step_capturable(self) -> None:
        for index, group in enumerate(self.param_groups):
            checks.check_gradients(group, index, [param.grad for param in group["params"]])
        for index, group in enumerate(self.param_groups):
            level, settings = bind(self.level(group), step=None), self._update_settings(group)
            view = None if level.is_elementwise else group.get("view")
            together: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
            for param in group["params"]:
                if param.grad is None or not param.numel():
                    continue
                if not self.state[param]:
                    if param.ndim < 2 and not level.is_elementwise:
                        self._accept(level, param, f"a parameter of group {index}")
                    self.state[param].update(begin_on_device(level, param, settings.period, view))
                together.setdefault((param.device, param.dtype), []).append(param)
            for params in together.values():
                step_capturable(level, params, [self.state[param] for param in params], settings, view)

    def watch(self, model: nn.Module, loss_scale: Scale | None = None, group: dist.ProcessGroup | None = None) -> None:
        """Sum up what the layers of `model` are shown from now on, for levels that ask for it (`dgd`, `ggd`).

        `nestopt.optimizer(model, …)` does so by itself. Needed again after unpickling or copying.

        Args:
            model: whose layers to watch.
            loss_scale: what the loss is multiplied with before `backward`, a number or a function that gives it
                (`GradScaler.get_scale`); only a nonlinear `ggd` has to know.
            group: the processes whose gradients are averaged, and whose layer inputs count as one batch. Default: where
                a group of processes is up, those of a DistributedDataParallel given as the model, else all. A process
                that trains by itself gives a group of its own.
        """
        self.of_model(model)
        self._watcher = Watcher(model, levels_of(self), loss_scale=loss_scale, group=group)

    @property
    def watcher(self) -> Seen | None:
        """Who says what layers were shown: `watch` makes one; an engine that knows better puts its own here."""
        return self._watcher

    @watcher.setter
    def watcher(self, seen: Seen | None) -> None:
        self._watcher = seen

    def of_model(self, model: nn.Module) -> None:
        """Call parameters that are added without names as `model` does, which is not kept alive."""
        self._model = weakref.ref(model)

    def tell_loss_scale(self, scale: Scale) -> None:
        """Say what the mean loss is multiplied with from now on, unless `watch` was told."""
        if isinstance(self._watcher, Watcher) and self._watcher.loss_scale is None:
            self._watcher.loss_scale = scale

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, as in torch, and the layer inputs that belong to them."""
        super().zero_grad(set_to_none)
        if isinstance(self._watcher, Watcher):
            self._watcher.forget()

    def _totals(self, param: Tensor) -> Totals | None:
        if self._watcher is None:
            return None
        found, name = self._watcher.totals(param), self._watcher.name(param)
        if self._unseen is not None and name is not None and not shown(found):
            self._unseen.append(name)
        return found

    def metrics(self) -> dict[str, Tensor]:
        """Return what levels have done, as numbers by name: `"0.fast.update_rms"` is of the level `fast` in group 0.

        Always there: `norm` of each memory, over all tensors of the group. From the last step, if the optimizer was
        made with `metrics=True`: `update_rms` (of directions), `writes` (how many tensors were written), and what the
        level itself reports, such as `inner_loss` and `clips`. With `on_nonfinite="skip"`, `skipped`: how many steps.
        """
        reported = self._recorder.metrics() if self._recorder else {}
        if self.options.on_nonfinite == "skip":
            reported["skipped"] = torch.tensor(self._skipped)
        return memory_norms(self.param_groups, self.state) | reported

    def _update_settings(self, group: dict[str, Any]) -> UpdateSettings:
        lr, coupled = group["lr"], self.coupled(group)
        decay: Any = group["weight_decay"]
        decay = decay if isinstance(decay, Tensor) else float(decay)  # schedules may write numbers of other libraries
        return UpdateSettings(
            lr.reshape(()) if isinstance(lr, Tensor) else float(lr),
            decay=0.0 if coupled else decay,
            coupled=decay if coupled else 0.0,
            maximize=group["maximize"],
            period=group.get("period", 1),
        )

    def complete(self, state: dict[str, Any], param: Tensor) -> None:
        """Add to the state of a parameter what its group's level has come to need."""

    def explain(self) -> Explanation:
        """Say of each parameter which level has it, at which learning rate and period, and why. Print it."""
        return explain(self.param_groups, self.level)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return state and groups as plain data: it loads under `weights_only=True`."""
        return checkpoint.to_plain(super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave, bit for bit: tensors are copied and keep their dtype.

        Checkpoints of torch's optimizer of the same name load into the named classes too.

        Raises:
            ValueError: groups, parameters or state do not fit this optimizer. Nothing has been changed then.
        """
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        self.__setstate__(checkpoint.fitted(self, state_dict))
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        watcher, model, accepted = (self.__dict__.get(key) for key in ("_watcher", "_model", "_accepted"))
        self._settle()
        # a copy has accepted none yet
        self._accepted = {id(param) for param in levels_of(self)} if accepted is None else accepted
        self._watcher, self._model = watcher, model  # loading leaves the model as it is
        if isinstance(watcher, Watcher):  # and may bring other levels
            watcher.ask(levels_of(self))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "options": self.options}
