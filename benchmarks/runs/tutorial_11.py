# %% [markdown]
# # 11. A name that is remembered, told as a circuit
#
# **What you will learn.** A text tells a name once, goes on about something else, and asks for it. The model says it.
# Which write holds the name, which head carries it, and which token reads it? Here every step of that is found, checked
# by taking it away, and put together as one graph.

# %%
import matplotlib.pyplot as plt
import torch

import writesae as ws

plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9})

model = ws.HookedRecurrentModel.from_pretrained("tiny-gdn", dtype="float32")
story = (
    "The captain was called{}. The ship went out of the harbour in the morning, and the people of the town looked at "
    "it for a long time. It was written that the captain was called"
)
text, other = story.format(" Henry"), story.format(" Robert")
tokens = model.to_str_tokens(text)


def says(text):
    with torch.no_grad():
        p = model(text)[0, -1].softmax(-1)
    token = int(p.argmax())
    return f"{model.to_str_tokens([token])[0]!r} ({float(p[token]):.0%})"


says(text), says(other)

# %% [markdown]
# ## Which write
#
# Put each write of the one text into the other, one at a time, and see how much of the way to the other name it goes.

# %%
name = ws.Logit(" Robert", minus=" Henry")
found = ws.patching(model, other, text, name, "write")
found.plot()

# %%
layer, head, t, restored = found.top(1)[0]
print(f"layer {layer} head {head} at {tokens[t]!r} alone: {restored:.0%}")
print(
    "and the estimate from one backward pass:",
    f"{float(found.estimate.max() - found.corrupted):.2f}",
    "of",
    f"{found.clean - found.corrupted:.2f}",
)

# %% [markdown]
# The head looks its answer up, and is nearly sure of it. There a gradient sees almost nothing: a small change of a sure
# answer changes little. Of such writes only real edits tell the size.

# %%
edits = {
    "as it is": [],
    "that write deleted": [ws.Delete(layer, head)],
    "the same of the other text": [
        ws.Replace(layer, head, write=model.run_with_cache(other)[1].write(layer)[0, t, head])
    ],
}
for words, edit in edits.items():
    with model.intervene(edit, positions=[t]):
        print(f"{words:28}{says(text)}")

# %% [markdown]
# ## Who reads it
#
# The pattern of the head: how strongly each token reads what each earlier one wrote. The last row is the token that
# answers.

# %%
ws.pattern(model, text, layer, head).plot()

# %%
for target in (len(tokens) - 1, len(tokens) - 2):
    with model.intervene(ws.Knockout(layer, head, sources=[t], targets=[target])):
        print(f"{tokens[target]!r} does not read it: {says(text)}")

# %% [markdown]
# ## The circuit
#
# Back from the name, through the read, the write, and what the write was made of, to the tokens. Norms, gates, keys and
# queries are held as they were, so what is in the graph is what was carried, not how the head knew where to look.

# %%
graph = ws.circuit(model, text, ws.Logit(" Henry", minus=" Robert"), max_nodes=128)
small = graph.prune(0.8, 0.9)
small.plot()

# %%
graph.top(8)

# %%
checked = graph.check(12)
print(f"deletions in the frozen model: r = {checked.r('node', 'frozen'):.3f}; in the model as it is: {checked.r():.2f}")
