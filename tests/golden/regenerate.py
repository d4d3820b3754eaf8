"""Recompute profiles.json from the formulas, and write it if --reason is given.

python tests/golden/regenerate.py                      # compare only
python tests/golden/regenerate.py --reason "why"       # overwrite
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from pathlib import Path

from mpmath import mp

sys.path.insert(0, str(Path(__file__).parent))
from formulas import DIGITS, PRODUCTS, exponent, solve_fit

FILE = Path(__file__).with_name("profiles.json")


def recompute(values: dict) -> dict:
    """All numbers again, for the questions (times, sigma_rels, noises) that the file asks."""
    new: dict = {"conversion": [], "inner_products": [], "fits": []}
    for row in values["conversion"]:
        gamma = float(exponent(row["sigma_rel"]))
        new["conversion"].append({"sigma_rel": row["sigma_rel"], "gamma": gamma})
    for row in values["inner_products"]:
        ends = (
            row["t_a"],
            exponent(row["sigma_rel_a"]),
            row["t_b"],
            exponent(row["sigma_rel_b"]),
        )
        new["inner_products"].append(
            {**row, **{name: float(product(*ends)) for name, product in PRODUCTS.items()}}
        )
    for row in values["fits"]:
        inputs, target = row["inputs"], row["target"]
        published = solve_fit(inputs, target, "density", 0.0, constrained=False)
        fresh = {
            "inputs": inputs,
            "target": target,
            "published": [float(v) for v in published["x"]],
        }
        for key in row.keys() - fresh.keys():
            noise = row[key]["noise"]
            result = solve_fit(inputs, target, key.split(":")[0], noise, constrained=True)
            fresh[key] = {
                "noise": noise,
                "x": [float(v) for v in result["x"]],
                "residual": float(result["residual"]),
            }
        new["fits"].append({key: fresh[key] for key in row})
    return new


def largest_difference(old: object, new: object) -> float:
    """Largest relative difference between two trees of numbers."""
    if isinstance(old, dict):
        return max((largest_difference(old[k], new[k]) for k in old), default=0.0)
    if isinstance(old, list):
        scale = sum(abs(v) for v in old) if old and isinstance(old[0], float) else 0.0
        if scale:  # coefficients: relative to sum |x|
            return max(abs(a - b) / scale for a, b in zip(old, new, strict=True))
        pairs = zip(old, new, strict=True)
        return max((largest_difference(a, b) for a, b in pairs), default=0.0)
    return abs(old - new) / abs(old) if old else abs(new)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reason", help="why the file is written anew; kept in its provenance")
    reason = parser.parse_args().reason
    mp.dps = DIGITS
    held = json.loads(FILE.read_text())
    values = recompute(held["values"])
    print(f"largest relative difference: {largest_difference(held['values'], values):.1e}")
    if reason is None:
        print(f"{FILE.name} is left as it is; give --reason to overwrite it")
        return 0
    held["values"] = values
    held["date"] = datetime.datetime.now(datetime.UTC).date().isoformat()
    held["reason"] = reason
    FILE.write_text(json.dumps(held, indent=1) + "\n")
    print(f"{FILE.name} written")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
