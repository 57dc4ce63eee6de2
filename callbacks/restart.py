"""Restart: optimizers and learning rate schedules as they once were, in the middle of training."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from pytorch_lightning import Trainer


class Restart:
    """The settings of a trainer's optimizers and the state of its schedules at one moment, to go back to.

    Optimizers start again without state, as if they were new; what holds them keeps them.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.groups = [
            [{key: deepcopy(value) for key, value in group.items() if key != "params"} for group in each.param_groups]
            for each in trainer.optimizers
        ]
        self.schedules = [_described(each.scheduler) for each in trainer.lr_scheduler_configs]

    def __call__(self, trainer: Trainer) -> None:
        """Goes back to that moment, with the optimizers' state empty."""
        for optimizer, groups in zip(trainer.optimizers, self.groups, strict=True):
            optimizer.state.clear()
            for group, settings in zip(optimizer.param_groups, groups, strict=False):
                group.update(deepcopy(settings))
        for config, (kind, state) in zip(trainer.lr_scheduler_configs, self.schedules, strict=False):
            if type(config.scheduler).__name__ == kind:  # a callback such as SWA may have put its own there
                config.scheduler.load_state_dict(deepcopy(state))

    def state_dict(self) -> dict[str, Any]:
        return {"groups": deepcopy(self.groups), "schedules": deepcopy(self.schedules)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Restart":
        """What `state_dict` described."""
        restart = cls.__new__(cls)
        restart.groups, restart.schedules = deepcopy(state["groups"]), deepcopy(state["schedules"])
        return restart


def _described(scheduler: Any) -> tuple[str, dict[str, Any]]:
    return type(scheduler).__name__, deepcopy(scheduler.state_dict())
