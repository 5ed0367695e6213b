"""Write docs/commands.md from the help of the command line, and check every link between the pages of the repository.

Usage: python tools/build_docs.py [--check]      (--check writes nothing and fails when docs/commands.md is out of date)
"""

import importlib.util
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ROOT / "docs" / "commands.md"
INLINE_LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)")
HTML_LINK = re.compile(r"\b(?:src|href)=\"([^\"]+)\"")
CODE = re.compile(r"^(```|~~~).*?^\1|(`+)(?!`).+?(?<!`)\2(?!`)", re.MULTILINE | re.DOTALL)


def command_reference() -> str | None:
    """The reference as Markdown, or None while there is no command line."""
    if importlib.util.find_spec("ncn.cli") is None:
        return None
    import typer.main
    from typer.cli import get_docs_for_click

    from ncn import cli

    command = typer.main.get_command(cli.app)
    context = command.make_context("ncn", [], resilient_parsing=True)
    page: str = get_docs_for_click(obj=command, ctx=context, name="ncn", title="The ncn command")
    return page.strip() + "\n"


def pages() -> list[Path]:
    folders = ["docs", "results", "benchmarks"]
    return sorted(ROOT.glob("*.md")) + sorted(page for folder in folders for page in (ROOT / folder).rglob("*.md"))


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    text = re.sub(r"^(```|~~~).*?^\1", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    names: list[str] = []
    for heading in re.findall(r"^#{1,6}\s+(.+?)\s*#*$", text, flags=re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        names.append(re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-"))
    repeated = {f"{name}-{count}" for name in names for count in range(1, names.count(name))}
    return {*names, *repeated} | set(re.findall(r"<a (?:id|name)=\"([^\"]+)\"", text))


def broken_links(page: Path) -> list[str]:
    text = CODE.sub("", page.read_text("utf-8"))
    broken = []
    for link in INLINE_LINK.findall(text) + HTML_LINK.findall(text):
        if re.match(r"[a-z][a-z+.-]*:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or not target.is_relative_to(ROOT):
            broken.append(f"{page.relative_to(ROOT)}: no such file: {link}")
        elif anchor and target.suffix == ".md" and anchor not in anchors(target):
            broken.append(f"{page.relative_to(ROOT)}: no such heading: {link}")
    return broken


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--check"]):
        print(__doc__, file=sys.stderr)
        return 2
    problems = []
    reference = command_reference()
    if reference is not None and (not COMMANDS.exists() or COMMANDS.read_text("utf-8") != reference):
        if arguments:
            problems.append("docs/commands.md differs from the command line's help: run `make docs` and commit it")
        else:
            COMMANDS.write_text(reference, "utf-8")
            print(f"wrote {COMMANDS.relative_to(ROOT)}")
    for page in pages():
        problems += broken_links(page)
    print("\n".join(problems) if problems else f"{len(pages())} pages, every link resolves")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
