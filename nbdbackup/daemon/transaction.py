"""Transactions: several changes of the graph at one instant, all of them or none.

An `Action` is one step. All nodes that the steps name are drained together; at that instant each step
is prepared in turn, so that a later one sees what an earlier one did; if one fails, those before it
are undone, the last first, and nothing has changed. Only then are all committed, and the nodes go on.

    ready (any time)  ->  drained: settle, ..., prepare, ...  ->  commit, commit, ...   ->  clean
                                                        `----->  abort in reverse order ->  clean

A single command is a transaction of one step.

Follows QEMU's `transaction` command; the words are the same.
"""

from collections.abc import Sequence
from contextlib import AsyncExitStack

from nbdbackup.block.node import Node, drained
from nbdbackup.errors import NbdBackupError
from nbdbackup.job.transaction import JobTransaction
from nbdbackup.monitor.steps import Step


class Action:
    """One step. Subclasses override what they need; `prepare` is where the step is taken."""

    async def ready(self) -> None:
        """What takes time: open files, take memory, find the nodes. Clients go on meanwhile.

        Raises:
            NbdBackupError, OSError: the step cannot be taken; `clean` is called none the less.
        """

    def join(self, together: JobTransaction) -> None:
        """Let the job that this step starts, if it does, share the fate of the others'. Before `ready`."""
        del together

    def nodes(self) -> Sequence[Node]:
        """The nodes that have to stand still; asked for after `ready`."""
        return ()

    async def settle(self) -> None:
        """Wait for what has to be so at the instant. The nodes are drained: be quick.

        Raises:
            NbdBackupError, OSError: it cannot be; nothing has changed.
        """

    def prepare(self) -> None:
        """Take the step, so that `abort` can undo it. The nodes are drained: be quick.

        Raises:
            NbdBackupError, OSError: it cannot be taken; nothing has changed.
        """

    def commit(self) -> None:
        """All steps were prepared: this one is final. The nodes are still drained. Must not fail."""

    def abort(self) -> None:
        """A later step failed: undo `prepare`. The nodes are still drained. Must not fail."""

    async def clean(self) -> None:
        """Give up what only the transaction needed; after everything else, once, in any case."""


class Failing(Action):
    """A step that cannot be taken."""

    def __init__(self, error: NbdBackupError) -> None:
        self._error = error

    def prepare(self) -> None:
        raise self._error


class Transactions:
    """Implements the monitor's `TransactionService`."""

    async def run(self, steps: Sequence[Step], *, grouped: bool = False) -> None:
        """Take all of `steps`, which are actions, or none."""
        actions = [step for step in steps if isinstance(step, Action)]
        assert len(actions) == len(steps)
        if grouped:
            together = JobTransaction()
            for action in actions:
                action.join(together)
        await run_transaction(actions)

    def failing(self, error: NbdBackupError) -> Step:
        """A step that fails with `error`."""
        return Failing(error)


async def run_transaction(actions: Sequence[Action]) -> None:
    """Take all of `actions` at one instant, or none.

    Raises:
        NbdBackupError, OSError: the first step that failed, in their order; nothing has changed.
    """
    # A stack: whatever befalls one `clean`, a cancellation too, the others have their turn.
    async with AsyncExitStack() as cleaning:
        able, failure = await _ready(actions, cleaning)
        async with drained(*dict.fromkeys(node for action in able for node in action.nodes())):
            for action in able:
                await action.settle()
            _take(able, failure)


async def _ready(
    actions: Sequence[Action], cleaning: AsyncExitStack
) -> tuple[Sequence[Action], Exception | None]:
    """Make the actions ready as far as that goes; those that are, and the failure of the next one, if any.

    It is not raised yet: an earlier step may fail in `prepare`, and it is that one the user hears of.
    """
    for number, action in enumerate(actions):
        cleaning.push_async_callback(action.clean)
        try:
            await action.ready()
        except Exception as error:
            return actions[:number], error
    return actions, None


def _take(actions: Sequence[Action], failure: Exception | None) -> None:
    prepared: list[Action] = []
    try:
        for action in actions:
            action.prepare()
            prepared.append(action)
        if failure is not None:
            raise failure
    except BaseException:
        for action in reversed(prepared):
            action.abort()
        raise
    for action in prepared:
        action.commit()
