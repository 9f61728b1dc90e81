"""MaLA-500's published evaluation, plain and slow: a full `transformers` forward pass per label and example.

It is the oracle of tests/test_evaluate.py and the baseline of benchmarks/evaluate.py. It shares no code with mala/
or evaluate.py.
"""

import numpy as np
import pandas
import torch

LABELS = {
    "sib200": "science/technology travel politics sports health entertainment geography".split(),
    "taxi1500": "Recommendation Faith Description Sin Grace Violence".split(),
}
NOUN = {"sib200": "news", "taxi1500": "verse"}


def read(root, bench, language, split):
    """Read the rows of a split as dicts."""
    columns = ("id", "label", "text")
    if bench == "sib200":
        file = root / language / f"{split}.tsv"
        table = pandas.read_csv(file, sep="\t", dtype=str, keep_default_na=False)
        return table.set_axis(columns, axis="columns").to_dict("records")
    lines = (root / language / f"{language}_{split}.tsv").read_text(encoding="utf-8").split("\n")
    return [dict(zip(columns, line.split("\t"))) for line in lines if line]


def few_shot(rng, train, doc, k):
    """Draw shots as the published sampler does: it stops only when it is given the index after the k-th."""

    def stream():
        while True:
            for index in rng.choice(len(train), size=k, replace=False, shuffle=True):
                yield int(index)

    found = []
    if k == 0:
        return found
    for index in stream():
        if len(found) >= k:
            return found
        if train[index] == doc:
            continue
        found.append(index)


def documents(root, bench, language, shots=3, seed=1234, limit=None):
    """Return [(row, shots, context)] in the published order."""
    train, test = read(root, bench, language, "train"), read(root, bench, language, "test")

    def ask(doc):
        return f'The topic of the {NOUN[bench]} "{doc["text"]}" is'

    rng = np.random.default_rng(seed)
    order = rng.permutation(len(test))
    result = []
    for number in order[:limit] if limit else order:
        doc = test[number]
        chosen = few_shot(rng, train, doc, shots)
        context = "".join(ask(train[i]) + " " + train[i]["label"] + "\n" for i in chosen) + ask(doc)
        result.append((doc, chosen, context))
    return result


@torch.no_grad()
def loglikelihoods(model, encode, requests, batch_size=1, max_length=2048):
    """Score requests, pairs of texts (context, continuation).

    They run longest first, padded on the right, `batch_size` per forward pass.
    """
    encoded = [(encode(context), encode(continuation)) for context, continuation in requests]
    results = [None] * len(requests)
    order = sorted(range(len(requests)), key=lambda i: -sum(map(len, encoded[i])))
    for start in range(0, len(order), batch_size):
        chunk = order[start : start + batch_size]
        inputs = [(encoded[i][0] + encoded[i][1])[-(max_length + 1) :][:-1] for i in chunk]
        width = max(map(len, inputs))
        filled = [ids + [0] * (width - len(ids)) for ids in inputs]
        logits = model(torch.tensor(filled, device=model.device)).logits
        for i, row, ids in zip(chunk, logits, inputs):
            continuation = encoded[i][1]
            log_probabilities = torch.log_softmax(
                row[len(ids) - len(continuation) : len(ids)].float(), dim=-1
            )
            targets = torch.tensor(continuation, device=model.device)
            results[i] = log_probabilities.gather(1, targets[:, None]).sum().item()
    return results


def evaluate(
    model, encode, root, bench, language, shots=3, seed=1234, limit=None, batch_size=1, max_length=2048
):
    """Return a dict per example: lang, id, shots, label, prediction, prediction_norm, loglikelihoods."""
    labels, examples = LABELS[bench], documents(root, bench, language, shots, seed, limit)
    requests = [(context, " " + label) for _, _, context in examples for label in labels]
    scores = np.array(loglikelihoods(model, encode, requests, batch_size, max_length)).reshape(
        -1, len(labels)
    )
    lengths = np.array([len(label) for label in labels])
    return [
        {"lang": language, "id": doc["id"], "shots": chosen, "label": doc["label"],
         "prediction": labels[int(np.argmax(row))], "prediction_norm": labels[int(np.argmax(row / lengths))],
         "loglikelihoods": dict(zip(labels, row.tolist()))}
        for (doc, chosen, _), row in zip(examples, scores)
    ]  # fmt: skip
