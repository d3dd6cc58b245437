"""
Counting contexts of 3 tokens and their next tokens (4-grams), and asking for them, against `collections.Counter`.

    OMP_NUM_THREADS=2 python benchmarks/ngram.py
    OMP_NUM_THREADS=2 python benchmarks/ngram.py --vocab_size 151936

Random text of Zipf's law in answers of about 200 tokens. Every row is a process of its own, which makes the text,
notes its peak memory, and then counts. Memory is what counting adds to that peak (`ru_maxrss`); the process may have
8 GiB of addresses more than before (`RLIMIT_AS`). The baseline is `Counter(zip(t, t[1:], t[2:], t[3:]))` on a list of
the same tokens, whose making is not timed; it is one dictionary in memory, without start symbols, and counts across
the ends of answers. Where it does not fit into the limit, it counts fewer of the tokens: rates are of the tokens that
were counted.

Times are the clock's. The tables are written to a temporary folder, not forced to disk. Queries are contexts of the
corpus in random order.
"""

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from common.processes import peak_bytes, printed_json, run_again

from trl_bbkd.bayeskd.ngram import answer_contexts, build_ngram_table


LIMIT = 8 * 2**30
N, K = 3, 16
CHUNK = 2**20


def make_text(tokens: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    cumulative = np.cumsum(1.0 / np.arange(1, vocab_size + 1))
    # Frequent ids are anywhere in a vocabulary
    ids = generator.permutation(vocab_size).astype(np.int32)
    text = np.empty(tokens, dtype=np.int32)
    for start in range(0, tokens, CHUNK):
        part = text[start : start + CHUNK]
        ranks = np.searchsorted(cumulative, generator.random(len(part)) * cumulative[-1])
        part[:] = ids[np.minimum(ranks, vocab_size - 1)]
    lengths = generator.integers(150, 251, tokens // 150)
    ends = np.minimum(np.cumsum(lengths), tokens)
    lengths = np.diff(ends[: np.searchsorted(ends, tokens) + 1], prepend=0)
    return text, lengths


def chunks_of(text: np.ndarray, lengths: np.ndarray, answers: int = 5000):
    ends = np.concatenate([[0], np.cumsum(lengths)])
    for first in range(0, len(lengths), answers):
        last = min(first + answers, len(lengths))
        yield text[ends[first] : ends[last]], lengths[first:last]


def limit_addresses() -> None:
    addresses = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (addresses + LIMIT, addresses + LIMIT))


def count_ours(arguments, tokens: int) -> dict:
    text, lengths = make_text(tokens, arguments.vocab_size)
    settings = {"num_tokens": tokens, "vocab_size": arguments.vocab_size, "context_length": N}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        # Threads, and what numpy does the first time
        few = {**settings, "num_tokens": 200}
        build_ngram_table(Path(folder) / "few", [(text[:200], [200])], **few)
        before = peak_bytes()
        limit_addresses()
        started = time.perf_counter()
        memory = {"memory_limit": arguments.memory_limit} if arguments.memory_limit else {}
        table = build_ngram_table(Path(folder) / "table", chunks_of(text, lengths), **settings, **memory)
        seconds = time.perf_counter() - started
        result = {"tokens": tokens, "seconds": seconds, "memory": peak_bytes() - before}
        result["disk"] = sum(path.stat().st_size for path in (Path(folder) / "table").iterdir())
        result["singleton_share"] = table.singleton_share
        if arguments.queries:
            result["queries"] = query_rates(table, text, lengths, arguments)
    return result


def query_rates(table, text, lengths, arguments) -> dict:
    """Contexts a second, by batch size: the median of some batches, after one."""
    generator = np.random.default_rng(1)
    starts = np.cumsum(lengths) - lengths
    rates = {}
    for batch in arguments.batches:
        found = {"top": [], "probability": []}
        for _ in range(6):
            # Whole answers would be contexts in order
            answers = np.minimum(generator.integers(0, len(lengths), batch), len(lengths) - 2)
            positions = starts[answers] + N + (generator.random(batch) * (lengths[answers] - N)).astype(int)
            windows = positions[:, None] + np.arange(-N, 1)
            contexts, next_ids = text[windows[:, :N]], text[windows[:, N]]
            started = time.perf_counter()
            ids, _, totals = table.top(contexts, K)
            found["top"].append(batch / (time.perf_counter() - started))
            started = time.perf_counter()
            probability = table.probability(contexts, next_ids)
            found["probability"].append(batch / (time.perf_counter() - started))
            assert totals.min() >= 1 and probability.min() > 0
        rates[batch] = {name: statistics.median(values[1:]) for name, values in found.items()}
    first = slice(0, int(lengths[:1000].sum()))
    started = time.perf_counter()
    answer_contexts(text[first], lengths[:1000], N, table.vocab_size)
    rates["answer_contexts"] = first.stop / (time.perf_counter() - started)
    return rates


def count_baseline(arguments, tokens: int) -> dict:
    text, _ = make_text(tokens, arguments.vocab_size)
    t = text[: arguments.first or tokens].tolist()
    before = peak_bytes()
    limit_addresses()
    try:
        started = time.perf_counter()
        counts = Counter(zip(t, t[1:], t[2:], t[3:], strict=False))
        seconds = time.perf_counter() - started
    except MemoryError:
        # Nothing is left to print with
        os._exit(3)
    return {"tokens": len(t), "seconds": seconds, "memory": peak_bytes() - before, "pairs": len(counts)}


def in_a_process(arguments, what: str, tokens: int, **options) -> dict | None:
    command = ["--what", what, "--tokens", str(tokens), "--vocab_size", str(arguments.vocab_size)]
    command += ["--batches", *map(str, arguments.batches)]
    command += ["--folder", arguments.folder] if arguments.folder else []
    done = run_again(*command, *(f"--{name}={value}" for name, value in options.items()))
    return None if done.returncode == 3 else printed_json(done)


def baseline(arguments, tokens: int, known: dict | None) -> dict:
    """The baseline on as many tokens as fit, judged by the memory of a smaller one."""
    first = tokens
    if known and tokens * known["memory"] / known["tokens"] > LIMIT:
        first = int(0.9 * LIMIT / known["memory"] * known["tokens"])
    while (result := in_a_process(arguments, "baseline", tokens, first=first)) is None:
        first = int(0.7 * first)
    return result


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[10**6, 10**7, 10**8], help="tokens")
    parser.add_argument("--vocab_size", type=int, default=50000)
    parser.add_argument("--repeats", type=int, default=3, help="of counting; the median counts")
    parser.add_argument("--batches", type=int, nargs="+", default=[4096, 65536], help="contexts of a query")
    parser.add_argument("--small_limit", type=int, default=256 * 2**20, help="bytes that force the temporary file")
    parser.add_argument("--folder", help="where the temporary folder is made")
    parser.add_argument("--what", choices=["ours", "baseline"], help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--queries", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--memory_limit", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv=None) -> None:
    arguments = parse_args(argv)
    if arguments.what:
        measure = {"ours": count_ours, "baseline": count_baseline}[arguments.what]
        print(json.dumps(measure(arguments, arguments.tokens)))
        return

    print(f"Vocabulary of {arguments.vocab_size:,}, n = {N}, {os.cpu_count()} cores\n")
    print("| | tokens counted | s | tokens/s | / Counter | peak memory, MiB | disk, bytes a token | seen once |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    rates, known = {}, None
    for tokens in sorted(arguments.sizes):
        known = counter = baseline(arguments, tokens, known)
        rows = {"Counter": counter}
        if counter["tokens"] < tokens:
            rows = {f"Counter, as many of the {tokens:,} as fit": counter}
        limits = {"table": {}}
        if tokens == max(arguments.sizes) and 8 * tokens > arguments.small_limit // 2:
            limits[f"table, limit of {arguments.small_limit // 2**20} MiB"] = {"memory_limit": arguments.small_limit}
        for name, limit in limits.items():
            last = {"queries": 1} if not limit else {}
            done = [in_a_process(arguments, "ours", tokens, **limit) for _ in range(arguments.repeats - 1)]
            done.append(in_a_process(arguments, "ours", tokens, **limit, **last))
            rows[name] = {**done[-1], "seconds": statistics.median(one["seconds"] for one in done)}
            rates[tokens] = done[-1].get("queries", rates.get(tokens))
        speed = counter["tokens"] / counter["seconds"]
        for name, row in rows.items():
            rate = row["tokens"] / row["seconds"]
            disk = f"{row['disk'] / row['tokens']:.1f} | {row['singleton_share']:.0%}" if "disk" in row else " | "
            print(
                f"| {name} | {row['tokens']:,} | {row['seconds']:.2f} | {rate:,.0f} | {rate / speed:.1f} | "
                f"{row['memory'] / 2**20:,.0f} | {disk} |",
                flush=True,
            )
    names = [f"{name}, batches of {batch:,}" for batch in arguments.batches for name in (f"top {K}", "probability")]
    print("\n| contexts/s, of a table of | " + " | ".join(names) + " | answer_contexts |")
    print("| --- |" + " ---: |" * (len(names) + 1))
    for tokens, found in rates.items():
        values = [value for batch in arguments.batches for value in found[str(batch)].values()]
        print(
            f"| {tokens:,} tokens | "
            + " | ".join(f"{value:,.0f}" for value in [*values, found["answer_contexts"]])
            + " |"
        )


if __name__ == "__main__":
    main()
