"""What atoms mean: labels by a language model, from contexts in which atoms fire, and scores of them."""

from writesae.explaining.chat import ChatModel, ChatServer
from writesae.explaining.delphi import write_delphi
from writesae.explaining.explain import explain

__all__ = ["ChatModel", "ChatServer", "explain", "write_delphi"]
