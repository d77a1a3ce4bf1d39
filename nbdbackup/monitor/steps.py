"""Steps of transactions, as far as commands know them."""

from typing import Protocol


class Step(Protocol):
    """One step of a transaction; a service makes it, `TransactionService.run` takes it."""

    async def ready(self) -> None:
        """Do what takes time. The rest of a step is between the services."""
