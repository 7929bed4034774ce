"""Hooks of mkdocs: formulas as MathML, which needs no script; linked files of the repository; roles in docstrings."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "CHANGELOG.md": "changelog.md",
    "python_tests/ptxsim/README.md": "ptxsim.md",
}  # in the repository -> in the site


def mathml(source, language, css_class, options, md, **_):
    from latex2mathml.converter import convert

    return f'<div class="formula">{convert(source, display="block")}</div>'


def on_config(config):
    fences = [{"name": "math", "class": "formula", "format": mathml}]
    config.mdx_configs["pymdownx.superfences"] = {"custom_fences": fences}
    return config


def on_files(files, config):
    """Adds the pages that lie outside docs/."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown, page, **_):
    for source, name in PAGES.items():
        markdown = markdown.replace(f"](../{source})", f"]({name})")
    markdown = re.sub(r"\[([^\]`]+)\]\(\.\./([^)]+)\)", r"\1 (`\2`)", markdown)  # files that the site does not have
    return re.sub(r"\[`(examples/\w+\.py)`\]\(\.\./examples/\w+\.py\)(.*?)\n\n", _with_code, markdown, flags=re.DOTALL)


def _with_code(match):
    """The paragraph that names an example, then its code, folded."""
    code = (ROOT / match[1]).read_text(encoding="utf-8")
    block = f"<details markdown><summary>The script</summary>\n\n```python\n{code}```\n\n</details>"
    return f"`{match[1]}`{match[2]}\n\n{block}\n\n"


def on_page_content(html, **_):
    """Roles and literal blocks of docstrings as HTML; cells with numbers, marked."""
    headings = sorted(set(re.findall(r'id="(ltood_fast\.[\w.]+)"', html)))

    def reference(match):
        name = next((heading for heading in headings if heading.endswith(f".{match[1]}")), None)
        return f'<a href="#{name}"><code>{match[1]}</code></a>' if name else f"<code>{match[1]}</code>"

    html = re.sub(r":(?:func|class|mod|meth):<code>(?:ltood_fast\.)?(\w+)</code>", reference, html)
    html = re.sub(r"(?<![/\w`>])docs/(\w+)\.md", r'<a href="\1.html">\1</a>', html)
    html = re.sub(r"<td>(?=[^<]*\d)([^<]{1,60})</td>", r'<td class="n">\1</td>', html)  # numbers stay on one line
    return re.sub(r"::</p>(\s*<(?:pre|div))", r":</p>\1", html)
