"""The style sheet of the report: light and dark, print, and screens from 400 px on."""

STYLE = """
:root {
  --paper: #fbfaf7; --panel: #ffffff; --ink: #1d2530; --soft: #5b6675; --line: #e1ded6; --accent: #1f5f8b; --tint: #eef3f6;
  --c0: #1f5f8b; --c1: #b5532a; --c2: #4b7f3a; --c3: #7a4f9a; --c4: #a07a12; --c5: #2a8a86; --c6: #a23b63; --c7: #5b6675;
}
@media (prefers-color-scheme: dark) {
  :root:not([data-theme="light"]) {
    --paper: #14181d; --panel: #1b2027; --ink: #e6e4df; --soft: #9aa5b1; --line: #313944; --accent: #7db9e0; --tint: #202a33;
    --c0: #7db9e0; --c1: #e89a6f; --c2: #93c47d; --c3: #bf9bdc; --c4: #d9b84f; --c5: #6cc7c2; --c6: #e48aad; --c7: #9aa5b1;
}
}
:root[data-theme="dark"] {
    --paper: #14181d; --panel: #1b2027; --ink: #e6e4df; --soft: #9aa5b1; --line: #313944; --accent: #7db9e0; --tint: #202a33;
    --c0: #7db9e0; --c1: #e89a6f; --c2: #93c47d; --c3: #bf9bdc; --c4: #d9b84f; --c5: #6cc7c2; --c6: #e48aad; --c7: #9aa5b1;
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
main { max-width: 60rem; margin: 0 auto; padding: 3rem 1.25rem 5rem; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.015em; font-weight: 650; }
h2 { font-size: 1.25rem; margin: 0 0 .9rem; font-weight: 620; letter-spacing: -.005em; }
h3 { font-size: 1rem; margin: 2rem 0 .6rem; font-weight: 620; }
p { margin: 0 0 1rem; max-width: 46rem; }
a { color: var(--accent); text-underline-offset: .15em; }
.kicker { color: var(--soft); margin: 0 0 2rem; max-width: none; }
.summary { font-size: 1.125rem; line-height: 1.6; margin: 2rem 0 0; }
.verdict { border: 1px solid var(--line); border-left: .35rem solid var(--c2); border-radius: .5rem; background: var(--panel); padding: .9rem 1.1rem; margin: 0 0 1.6rem; }
.verdict.changed { border-left-color: var(--c4); }
.verdict.damaged { border-left-color: var(--c6); }
.verdict p { margin: 0; max-width: none; }
.verdict ul { margin: .5rem 0 0; padding-left: 1.2rem; }
.said { white-space: pre-wrap; overflow-wrap: anywhere; }
section { margin-top: 3.5rem; padding-top: 1.6rem; border-top: 1px solid var(--line); }
.cards { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); margin: 0; padding: 0; list-style: none; }
.cards > li { background: var(--panel); border: 1px solid var(--line); border-radius: .6rem; padding: 1rem 1.1rem 1.05rem; }
.cards .name { display: block; color: var(--soft); font-size: .85rem; }
.cards .value { display: block; font-size: 1.75rem; line-height: 1.25; font-weight: 620; letter-spacing: -.02em; font-variant-numeric: tabular-nums; }
.cards .note { display: block; color: var(--soft); font-size: .85rem; line-height: 1.4; margin-top: .15rem; }
.scroll { overflow-x: auto; }
.scroll:focus-visible { outline: 2px solid var(--accent); outline-offset: 3px; }
table { border-collapse: collapse; width: 100%; font-size: .93rem; font-variant-numeric: tabular-nums; margin: 0 0 1.4rem; }
caption { text-align: left; color: var(--soft); font-size: .87rem; padding-bottom: .45rem; }
th, td { padding: .42rem .9rem .42rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { font-weight: 500; }
thead th { color: var(--soft); font-size: .84rem; font-weight: 500; border-bottom-color: var(--soft); vertical-align: bottom; }
.number { text-align: right; white-space: nowrap; padding-right: 0; padding-left: 1.2rem; }
.error { color: var(--soft); font-size: .86em; }
td.text, th.text { overflow-wrap: anywhere; }
figure { margin: 0 0 2.2rem; }
figcaption { color: var(--soft); font-size: .87rem; line-height: 1.5; margin-top: .6rem; max-width: 46rem; }
.chart > svg { display: block; width: 100%; height: auto; }
.scroll .chart:not(.drawn) > svg { min-width: 36rem; }
.chart.drawn > svg { display: none; }
.live { width: 100%; }
figure:has(.drawn) ul.legend { display: none; }
.skip { position: absolute; left: -99rem; }
.skip:focus { left: 1rem; top: .5rem; background: var(--panel); padding: .4rem .8rem; z-index: 9; }
.contents ul { columns: 16rem; padding: 0; margin: 2.2rem 0 0; list-style: none; font-size: .95rem; }
.contents li { padding: .12rem 0; }
#theme { float: right; font: inherit; font-size: .85rem; color: var(--ink); background: var(--panel); border: 1px solid var(--soft); border-radius: .4rem; padding: .25rem .6rem; cursor: pointer; }
a:focus-visible, button:focus-visible, summary:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.chart > svg text { fill: var(--soft); font: 12px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
.chart > svg .title { fill: var(--ink); font-size: 13px; font-weight: 600; }
svg .cell { fill: var(--accent); }
svg .empty { fill: var(--line); fill-opacity: .35; }
svg .whole { fill: none; stroke: var(--ink); stroke-width: 1.1; }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .axis { stroke: var(--soft); stroke-width: 1; }
svg .line { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
svg .dot { stroke: none; }
.panels { display: grid; gap: 1.2rem 1.6rem; grid-template-columns: repeat(auto-fill, minmax(16rem, 1fr)); }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1.2rem; font-size: .87rem; color: var(--soft); margin: 0 0 .5rem; padding: 0; list-style: none; }
.legend svg { display: inline-block; width: 1.9rem; height: .7rem; vertical-align: baseline; margin-right: .4rem; min-width: 0; }
details { margin: 0 0 1rem; }
summary { cursor: pointer; color: var(--accent); padding: .2rem 0; }
details[open] > summary { margin-bottom: .7rem; }
pre { background: var(--tint); border-radius: .5rem; padding: .9rem 1.1rem; overflow-x: auto; font-size: .87rem; line-height: 1.55; }
code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: .94em; }
footer { margin-top: 4rem; color: var(--soft); font-size: .85rem; }
@media (max-width: 34rem) {
  main { padding: 1.8rem 1rem 3rem; }
  h1 { font-size: 1.6rem; }
  .summary { font-size: 1.05rem; }
  .cards { grid-template-columns: 1fr 1fr; }
  .cards .value { font-size: 1.4rem; }
  section { margin-top: 2.4rem; }
  .number { padding-left: .7rem; }
  .error { display: block; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; padding: .7rem .8rem; }
  .next { padding-left: 1.1rem; }
  table { font-size: .86rem; }
  .texts, .texts caption, .texts tbody, .texts tr, .texts tbody th, .texts tbody td { display: block; padding-right: 0; }
  .texts thead { position: absolute; left: -99rem; }
  .texts tr { border-bottom: 1px solid var(--soft); padding: .5rem 0; }
  .texts tbody th, .texts tbody td { border: 0; }
  .texts tbody th { font-weight: 620; }
  .texts td::before { content: attr(data-column); display: block; color: var(--soft); font-size: .92em; }
  caption { white-space: normal; }
}
@media print { .chart.drawn > svg { display: block; } .live, .contents, #theme { display: none; } body { background: #fff; } details { display: block; } .scroll { overflow: visible; } }
"""
