"""An attempt of a fence as its driver sees it, without a policy: for tests of drivers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import trio


@dataclass
class LoneAttempt:
    """`extfs.layout.Attempt`. `at_issue` is called when the driver says that it begins to harm."""

    number: int = 1
    issued_before: bool = False
    at_issue: Callable[[], None] = lambda: None
    issues: int = 0

    async def issued(self) -> None:
        await trio.lowlevel.checkpoint()
        self.issues += 1
        self.at_issue()
