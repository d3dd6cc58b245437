"""The look of the page of a comparison: narrow first, in light and dark."""

from .line_chart import COLORS


_STYLE = """
:root {
  color-scheme: light dark;
  --ink: #1f2937; --soft: #4b5563; --line: #d1d5db; --paper: #ffffff; --card: #f6f7f9; --mark: #fde68a; --better: #166534; --worse: #b91c1c;
  LIGHT
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e5e7eb; --soft: #a8b0bd; --line: #374151; --paper: #111827; --card: #1f2937; --mark: #613a10; --better: #86efac; --worse: #fca5a5;
    DARK
  }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 64rem; padding: 1rem; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: break-word; -webkit-text-size-adjust: 100% }
h1 { font-size: 1.35rem; line-height: 1.3; margin: 0 0 .75rem }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem }
h3 { font-size: 1.05rem; margin: 0 }
h4 { font-size: .9rem; margin: .7rem 0 .1rem }
p { max-width: 44rem; margin: .75rem 0; font-size: .9rem }
p, small { color: var(--soft) }
small { font-size: .8rem }
.better { color: var(--better) } .worse { color: var(--worse) }

.runs, .charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: .75rem; align-items: start }
.runs > *, figure, article { margin: 0; padding: .75rem; background: var(--card); border-radius: .5rem; min-width: 0 }
.runs small { display: block }
.runs ul { list-style: none; margin: 0; padding: 0; font-size: .95rem }
.runs li { display: flex; flex-wrap: wrap; justify-content: space-between; column-gap: .75rem; border-top: 1px solid var(--line); padding: .2rem 0 }
.runs li span { font-variant-numeric: tabular-nums; margin-left: auto; white-space: nowrap } .runs li small { display: inline }
i { display: inline-block; width: 1.1em; margin-right: .4em; vertical-align: .2em; border-top: .25em solid }

.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem }
th, td { padding: .35rem .4rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top }
th { vertical-align: bottom; font-size: .8rem; line-height: 1.3; overflow-wrap: normal } tr:last-child td { border: 0 } th i { display: block; margin: 0 0 .3em auto }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); padding-left: 0; width: 1%; min-width: 4.5rem }
td small { display: block }
@media (min-width: 44rem) { th:first-child, td:first-child { width: auto; white-space: nowrap; padding-right: 2rem } th, td { padding-left: 1.25rem } }
.settings td { text-align: left; min-width: 5rem; overflow-wrap: normal }
.settings th { text-align: left } .settings th i { margin-left: 0 }

details { border-top: 1px solid var(--line) } details[open] { padding-bottom: .75rem }
summary { padding: .7rem 0; cursor: pointer; font-weight: 600 }

figcaption { font-weight: 600; font-size: .9rem }
svg { width: 100%; height: auto; display: block } svg text { fill: var(--soft); font-size: 13px } .grid { stroke: var(--line) }
@media (min-width: 44rem) { svg text { font-size: 10px } }
.legend { font-size: .85rem; display: flex; flex-wrap: wrap; gap: .2rem 1rem } .legend span { min-width: 0 }

article { margin: .75rem 0 }
dl { margin: 0 } dt { color: var(--soft); font-size: .85rem; margin-top: .4rem } dt:first-child { margin-top: 0 }
dd { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere }
mark { background: var(--mark); color: inherit }
"""


def style() -> str:
    light, dark = (" ".join(f"--c{number}: {color};" for number, color in enumerate(colors)) for colors in COLORS)
    return _STYLE.replace("LIGHT", light).replace("DARK", dark)
