"""What atoms mean: labels by a language model, from contexts in which atoms fire, and scores of them."""

from writesae.explaining.chat import ChatModel, ChatServer
from writesae.explaining.explain import explain

__all__ = ["ChatModel", "ChatServer", "explain"]
