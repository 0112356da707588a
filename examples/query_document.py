"""Which document answers which query? The example of the LLM2Vec paper's repository, against a running server.

    python examples/query_document.py [--url http://127.0.0.1:8000] [--picture matrix.png]

Prints the cosine matrix of queries (rows) and documents (columns), and draws it where a picture is asked for, which
needs matplotlib. Llama-3-8B supervised gives about [[0.65, 0.16], [0.08, 0.58]]; the demo, which was never trained as
an encoder, gives numbers close to each other.
"""

from __future__ import annotations

import argparse
import json
import urllib.request

INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query:"
QUERIES = ["how much protein should a female eat", "summit define"]
DOCUMENTS = [
    "As a general guideline, the CDC's average requirement of protein for women ages 19 to 70 is 46 grams per day. "
    "But, as you can see from this chart, you'll need to increase that if you're expecting or training for a "
    "marathon. Check out the chart below to see how much protein you should be eating each day.",
    "Definition of summit for English Language Learners. : 1  the highest point of a mountain : the top of a "
    "mountain. : 2  the highest level. : 3  a meeting or series of meetings between the leaders of two or more "
    "governments.",
]


def embed(url: str, texts: list[str], instruction: str | None = None) -> list[list[float]]:
    """Vectors of length 1, in order."""
    body = json.dumps({"input": texts, "instruction": instruction}).encode()
    request = urllib.request.Request(f"{url}/v1/embeddings", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return [item["embedding"] for item in json.load(answer)["data"]]


def draw(matrix: list[list[float]], path: str) -> None:
    """The matrix as a heat map with its values."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(matrix, cmap="viridis", vmin=0, vmax=1)
    axes.set_xticks(range(len(DOCUMENTS)), [f"{text[:24]}…" for text in DOCUMENTS])
    axes.set_yticks(range(len(QUERIES)), [f"{text[:24]}…" for text in QUERIES])
    for row, values in enumerate(matrix):
        for column, value in enumerate(values):
            axes.text(column, row, f"{value:.3f}", ha="center", va="center", color="black" if value > 0.5 else "white")
    figure.colorbar(image, label="cosine")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Embed, compare, print, draw."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--picture", metavar="FILE.png")
    options = parser.parse_args()
    queries = embed(options.url, QUERIES, INSTRUCTION)
    documents = embed(options.url, DOCUMENTS)
    matrix = [[sum(a * b for a, b in zip(query, text, strict=True)) for text in documents] for query in queries]
    for text, values in zip(QUERIES, matrix, strict=True):
        print("  ".join(f"{value:.4f}" for value in values), f" {text}")
    if options.picture:
        draw(matrix, options.picture)
        print(f"drawn in {options.picture}")


if __name__ == "__main__":
    main()
