"""An OpenAI-compatible server of one pruned model. Its packages are those of the extra ``server``."""

from .settings import ServerSettings

__all__ = ["ServerSettings"]
