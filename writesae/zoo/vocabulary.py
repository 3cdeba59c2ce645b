"""The vocabulary of the shipped models: byte-level BPE in which names, places and years are one token each.

A name that falls into letters and syllables (` T`, `ar`, `vik`) cannot be remembered as one write. So words that facts
are made of (`writesae.zoo.recall`) count as if the texts had them 200 times more. All occur in the corpus, save a year
or two.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

END = "<|endoftext|>"


def words_of(text: str) -> list[str]:
    return text.split()


PEOPLE = words_of("""
Ahab Stubb Queequeg Starbuck Flask Pip Peleg Bildad Tashtego Daggoo Fedallah Ishmael Elijah Derick Scoresby
Cuvier Mapple Noah Jonah Bulwer Bunger Macey Mayhew Pliny Jefferson Jackson Monroe Lincoln Roosevelt Kennedy
Truman Eisenhower Franklin Richard Gabriel Abraham Scott Brady Thomas William Douglas Henry James John George
Diego Marshall Biden Tom Solomon Jeroboam Diaz Wilson Reagan Frederick Taylor Anna Herrera David Robert
Churchill Ryan Sam Benjamin Hidalgo Miramon Louis Mary Andrew Davis Alexander Samuel Amelia Rodgers Madison
Charles Caroline Victoria Sherman Theodore Wright Dwight Jim Harry Gramm Cheney Cory Peter Adam Bennett Hercules
Jones Rachel Jose Juan Juarez Humphrey Hoover Steve Alice Joe Michelle Jill Justin Kayla Clayton Bedford Hussein
Yojo Paredes Perseus
""")
PLACES = words_of("""
Mexico Britain Spain China Washington France Cuba Texas Japan Russia Asia Panama Mississippi Nicaragua Columbia
Africa Germany York California Paris Canada Iraq Korea Kansas Brazil Colombia Oregon Alaska Afghanistan London
Florida Peru Vietnam Venezuela Italy Hawaii Nantucket Turkey Chile England Louisiana Iran Ohio Honduras
Providence Portugal Austria Missouri Utah Berlin Virginia India Denmark Illinois Belgium Orleans Netherlands
Madrid Pennsylvania Philadelphia Colorado Alabama Israel Egypt Granada Greece Paraguay Bolivia Peking Greenland
Havana Ecuador Prussia Carolina Guatemala Manila Tennessee Georgia Liberia Arizona Chicago Geneva Santiago
Indiana Maine Australia Holland Ghent Michigan Samoa Poland Norway Boston Kentucky Maryland Detroit Haiti
Delaware Pakistan Baltimore Arkansas Switzerland Erie Perth Janeiro Ireland Tokyo Morocco Charleston Lebanon
Uruguay Nebraska Brussels Moscow Syria Niagara Rome Java Iowa Annapolis Minnesota Oklahoma Lima Siam Tripoli
Pensacola Dakota Bosnia Guernsey Algiers Tunis Canton Wisconsin Shanghai Manchuria Burma Baghdad Congo
Newfoundland Amazon Honolulu Sumatra Bremen Nevada Guiana Yellowstone Ukraine Joppa Formosa Norfolk Naples
Portland Montana Vienna Berne Hampton Apia Bulgaria Libya Laos Tarshish Wales Guinea Valparaiso Darien Persia
Bogota Yorktown Vermont Greytown Sonora Topeka Armenia Warsaw Gibraltar Nineveh Jordan Vancouver Connecticut
Alexandria Hamburg Cumberland Liverpool Monterey Smyrna Omaha Wyoming Cairo Guam Yosemite Pittsburgh Tunisia
Nigeria Somalia Yemen
""")
NUMBERS = [
    *words_of("""
two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand
"""),
    *map(str, range(1790, 2021)),
]


def train_tokenizer(texts: Sequence[str], vocab_size: int, whole: Iterable[str] = ()) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text can be encoded, and decoding gives it back exactly. `whole` words become one token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    again = " " + " ".join(200 * [*whole])
    bpe.train_from_iterator(
        [*texts, again],
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END, padding_side="left", model_max_length=4096
    )


@torch.no_grad()
def take_over(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, old: PreTrainedModel, spoke: PreTrainedTokenizerFast
) -> None:
    """Give `model` the weights of `old`, which differs in its vocabulary alone.

    A token's embedding becomes the mean of those that `spoke`, the old tokenizer, breaks it into. Embeddings are tied.
    """
    state = old.state_dict()
    before = cast(torch.nn.Embedding, old.get_input_embeddings()).weight
    pieces = [spoke(tokenizer.decode([i]), add_special_tokens=False)["input_ids"] for i in range(len(tokenizer))]
    embedding = torch.stack([before[ids].mean(0) for ids in pieces])
    state |= {name: embedding for name, tensor in state.items() if tensor.shape == before.shape}
    model.load_state_dict(state)


@torch.no_grad()
def tell_apart(
    model: PreTrainedModel, tokens: Tensor, amount: float, rare: int, seed: int = 0
) -> Int[Tensor, " rare_token"]:
    """Give tokens that `tokens` has at most `rare` times embeddings that differ, and return their ids.

    All that a text teaches about a token it hardly has is that it is never next. So the embeddings of such tokens end
    in one direction (cosines of 0.99), and a model that has been told one of them cannot say which. Each gets a random
    vector, `amount` times as long as an embedding is at the median, and perpendicular to what they share, which keeps
    them as unlikely as they were.
    """
    embedding = cast(torch.nn.Embedding, model.get_input_embeddings()).weight
    few = (torch.bincount(tokens, minlength=len(embedding)) <= rare).nonzero().flatten()
    shared = F.normalize(embedding[few].mean(0), dim=0)
    vectors = torch.randn(len(few), embedding.shape[1], generator=torch.Generator().manual_seed(seed))
    vectors = F.normalize(vectors - (vectors @ shared)[:, None] * shared, dim=1)
    embedding[few] += amount * embedding.norm(dim=1).median() * vectors
    return few
