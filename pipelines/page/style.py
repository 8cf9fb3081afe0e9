"""How the page looks: light or dark as the reader's system is, from a phone to a wide window."""

from pipelines.page.markup import Markup

STYLE = Markup("""
:root {
  color-scheme: light dark;
  --ground: #fbfbfc; --surface: #ffffff; --sunken: #f3f5f7; --text: #1b1f26; --muted: #59616d;
  --line: #e2e6eb; --strong: #c3cad3; --edge: #aab3bf; --lit: #1b1f26; --link: #1f5fbf;
  --done: #18774a; --reused: #1f5fbf; --running: #8a5a00; --failed: #bf2a2a; --idle: #646c78;
  --c0: #1f5fbf; --c1: #b8500a; --c2: #18774a; --c3: #7a3fb5; --small: #59616d;
  --sans: -apple-system, BlinkMacSystemFont, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  --mono: ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #13161b; --surface: #1a1e25; --sunken: #20252d; --text: #e5e8ed; --muted: #9aa4b1;
    --line: #2b313b; --strong: #444d5a; --edge: #5c6675; --lit: #e5e8ed; --link: #82b1ff;
    --done: #4fc48c; --reused: #82b1ff; --running: #e3b341; --failed: #ff7b74; --idle: #8f99a6;
    --c0: #82b1ff; --c1: #f2a05e; --c2: #4fc48c; --c3: #c49bf2; --small: #9aa4b1;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body {
  margin: 0 auto; max-width: 1440px; padding: 28px 32px 64px; background: var(--ground); color: var(--text);
  font: 14px/1.5 var(--sans); font-variant-numeric: tabular-nums;
}
h1, h2, h3 { margin: 0; line-height: 1.25; font-weight: 600; }
h1 { display: flex; flex-wrap: wrap; gap: 6px 14px; align-items: center; font-size: 24px; overflow-wrap: anywhere; }
h1 .state { font-size: 14px; padding: 2px 10px 2px 8px; border: 1px solid currentColor; border-radius: 99px; }
h2 { margin-bottom: 12px; font-size: 17px; }
h3 { margin-bottom: 8px; font-size: 14px; }
p, ul, dl, dd, figure { margin: 0; padding: 0; }
a { color: var(--link); text-decoration: none; }
a:hover { text-decoration: underline; }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; border-radius: 3px; }
code, .name, .names a, .verb, .digest, .ancestry .role, .timeline th a, .costs th a, .intervals caption a,
.failures > li > a {
  font-family: var(--mono); font-size: 12.5px;
}
.digest { display: inline-block; max-width: 12ch; overflow: hidden; vertical-align: bottom; color: var(--muted);
  text-overflow: clip; white-space: nowrap; }
.path { overflow-wrap: anywhere; }
.hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
.note { max-width: 100ch; margin-top: 10px; color: var(--muted); }
.note.names { max-width: none; }
.number { text-align: right; white-space: nowrap; }
.icons { position: absolute; }
.icon { width: 12px; height: 12px; fill: none; stroke: currentColor; stroke-width: 1.6; stroke-linecap: round;
  stroke-linejoin: round; }
.state { display: inline-flex; gap: 5px; align-items: center; white-space: nowrap; font-weight: 500; }
.done, .holds { color: var(--done); }
.reused { color: var(--reused); }
.running, .serving { color: var(--running); }
.failed, .interrupted, .fails { color: var(--failed); }
.waiting, .skipped, .stopped { color: var(--idle); }
.serving { color: var(--done); }

.part { margin-top: 36px; scroll-margin-top: 16px; }
.card { min-width: 0; padding: 10px 14px; background: var(--surface); border: 1px solid var(--line);
  border-radius: 8px; }
.scroll { overflow: auto; background: var(--surface); border: 1px solid var(--line); border-radius: 8px; }
.facts { display: flex; flex-wrap: wrap; gap: 8px 28px; margin-top: 14px; }
.facts > div { min-width: 0; }
dt { color: var(--muted); font-size: 12px; }
dd { overflow-wrap: anywhere; }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; margin-top: 18px; padding: 8px 0;
  border-block: 1px solid var(--line); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; margin-top: 8px; color: var(--muted); font-size: 12px; }
.legend > span { display: inline-flex; gap: 5px; align-items: center; }
.legend .done { color: var(--done); } .legend .reused { color: var(--reused); }
.sample { width: 24px; height: 10px; flex: none; }
#what-went-wrong { padding: 14px 18px; background: var(--surface); border: 1px solid var(--line);
  border-left: 4px solid var(--failed); border-radius: 8px; }
.failures { display: grid; gap: 8px; list-style: none; overflow-wrap: anywhere; }

.graph { max-height: 88vh; padding: 6px; }
.graph > svg { display: block; width: 100%; margin: 0 auto; font-family: var(--mono); }
.graph a:hover { text-decoration: none; }
.step .box { fill: var(--surface); stroke: var(--strong); }
.step.reused .box { stroke-dasharray: 4 3; }
.step.failed .box, .step.interrupted .box { stroke: var(--failed); }
.step:hover .box { fill: var(--sunken); }
.step .side { fill: currentColor; }
.step.waiting .side, .step.skipped .side { opacity: .45; }
.step .name { fill: var(--text); font-size: 11.5px; font-weight: 600; }
.step.waiting .name, .step.skipped .name { fill: var(--muted); }
.step .verb { fill: var(--muted); font-size: 10.5px; }
.step .fact { fill: currentColor; font-size: 10.5px; }
.step:focus-visible { outline: none; } .step:focus-visible .box { stroke: var(--link); stroke-width: 2; }
.input rect { fill: var(--sunken); stroke: var(--strong); }
.input text { fill: var(--text); font-size: 11.5px; }
.edge { fill: none; stroke: var(--edge); stroke-width: 1; }
.edge.model, .edge.adapter { stroke-width: 2; }
.edge.metrics { stroke-dasharray: 4 3; }
.edge.deployment { stroke-dasharray: 1 3; }

table { border-collapse: collapse; }
th { font-weight: 500; text-align: left; }
thead th { color: var(--muted); font-size: 12px; }
small { display: block; color: var(--muted); font-size: 11.5px; font-weight: 400; }
.fit { width: fit-content; max-width: 100%; }
.evaluations th, .evaluations td { padding: 4px 16px; white-space: nowrap; }
.evaluations td, .evaluations thead tr + tr th { text-align: right; }
.evaluations tbody tr { border-top: 1px solid var(--line); }
.evaluations tbody th, .evaluations thead tr:first-child th:first-child {
  position: sticky; left: 0; background: var(--surface); }
.evaluations tbody th { font-family: var(--mono); font-size: 12.5px; }
.evaluations tbody th small { font-family: var(--sans); }
.evaluations .set { border-left: 1px solid var(--line); }
.evaluations thead th.set { color: var(--text); font-size: 13px; }
.evaluations thead tr + tr th.set { color: var(--muted); font-size: 12px; }
b { font-weight: 650; }
.costs th, .costs td { padding: 4px 16px; white-space: nowrap; }
.costs tbody tr { border-top: 1px solid var(--line); }
.costs .number:nth-child(even) { color: var(--muted); }
.costs .besides th { color: var(--muted); }
.costs tr:not(.besides) + .besides { border-top: 1px solid var(--strong); }
.costs .besides:last-child { font-weight: 600; }

.search + .search { margin-top: 28px; }
.search h3 { font-weight: 500; }
.search figure, .search .cards { margin-bottom: 14px; }
.trial { fill: none; stroke: var(--c0); stroke-width: 1; stroke-opacity: .4; stroke-linejoin: round; }
.trial.unbeaten { stroke: var(--c2); stroke-width: 1.5; stroke-opacity: .9; }
.trial.best { stroke: var(--c1); stroke-width: 2.5; stroke-opacity: 1; }
g:hover > .trial { stroke-width: 2.5; stroke-opacity: 1; }
.axis .goal { fill: var(--text); font-weight: 600; }
.dot circle { fill: var(--c0); fill-opacity: .6; }
.dot.unbeaten circle { fill: var(--c2); fill-opacity: 1; } .dot.best circle { fill: var(--c1); fill-opacity: 1; }
.trials th, .trials td { padding: 3px 12px; white-space: nowrap; }
.trials td { text-align: right; }
.trials tbody tr { border-top: 1px solid var(--line); }
.trials .chosen { background: var(--sunken); font-weight: 600; }

.intervals { width: 100%; background: var(--surface); border: 1px solid var(--line); border-radius: 8px;
  border-collapse: separate; border-spacing: 0; }
.intervals + .intervals { margin-top: 16px; }
.intervals caption { padding-bottom: 8px; text-align: left; }
.intervals caption .verdict { margin-left: 12px; }
.intervals th, .intervals td { padding: 2px 14px; }
.intervals thead th { padding-top: 8px; }
.intervals .plot { width: 46%; padding-block: 0; }
.interval { display: block; width: 100%; height: 28px; overflow: visible; }
.interval .tick { stroke: var(--line); }
.interval .zero { stroke: var(--muted); stroke-dasharray: 3 3; }
.interval .whisker { stroke: currentColor; stroke-width: 2; }
.interval circle { fill: currentColor; }
.intervals .axis td { padding-bottom: 10px; color: var(--muted); font-size: 12px; }
.verdict { font-weight: 600; }
.verdict::before { content: "\\2713\\00a0"; } .verdict.fails::before { content: "\\2715\\00a0"; }
.ruler { position: relative; height: 18px; color: var(--muted); font-size: 11.5px; font-weight: 400; }
.ruler span { position: absolute; transform: translateX(-50%); white-space: nowrap; }

.delivered { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 420px), 1fr)); gap: 14px; }

.timeline { width: 100%; }
.timeline th, .timeline td { padding: 0; white-space: nowrap; }
.timeline tbody th, .timeline thead th:first-child { padding-right: 18px; }
.timeline tbody tr:hover { background: var(--sunken); }
.timeline td:nth-child(2), .timeline th:nth-child(2) { width: 100%; }
.timeline .number { padding-left: 22px; font-size: 12.5px; }
.timeline .number .state { font-weight: 400; }
.tries { color: var(--muted); font-size: 12px; }
.track { position: relative; height: 22px; }
.track i { position: absolute; top: 0; bottom: 0; }
.tick { border-left: 1px solid var(--line); }
.track .gap { background: repeating-linear-gradient(-45deg, var(--strong) 0 1px, transparent 1px 5px); }
.track .bar { top: 5px; bottom: 5px; min-width: 3px; border-radius: 2px; background: currentColor; }
.track .bar.failed, .track .bar.interrupted { background: repeating-linear-gradient(-45deg, currentColor 0 3px,
  transparent 3px 5px); outline: 1px solid currentColor; outline-offset: -1px; }
.track .count { min-width: 1px; background: var(--c0); }
.ruler .pause { font-size: 10.5px; }

.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); gap: 14px; }
figcaption { display: flex; flex-wrap: wrap; gap: 2px 10px; align-items: baseline; }
figcaption .name { font-weight: 600; }
figcaption .fact { margin-left: auto; color: var(--muted); font-size: 12px; }
.verb { color: var(--muted); font-size: 12px; }
figure .legend { margin: 4px 0 6px; }
figure .legend b { color: var(--text); }
figure.card { display: flex; flex-direction: column; }
figure > svg { display: block; width: 100%; height: auto; margin-top: auto; overflow: visible; }
.axis text { fill: var(--muted); font-size: 10.5px; }
.axis path { fill: none; stroke: var(--line); }
.axis .base { stroke: var(--strong); }
.curve path { fill: none; stroke: currentColor; stroke-width: 1.3; stroke-linejoin: round; }
.curve circle { fill: var(--surface); stroke: currentColor; stroke-width: 1.3; }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); } .c3 { color: var(--c3); }
.c2 path { stroke-dasharray: 6 2; } .c3 path { stroke-dasharray: 2 2; }
.small { color: var(--small); }
.band rect { fill: transparent; } .band:hover rect { fill: var(--text); fill-opacity: .1; }

.steps { background: var(--surface); border: 1px solid var(--line); border-radius: 8px; }
details + details { border-top: 1px solid var(--line); }
summary { display: grid; gap: 4px 20px; align-items: center; padding: 5px 14px; font-size: 13px; cursor: pointer;
  list-style: none;  grid-template-columns: 14px minmax(150px, 2fr) minmax(130px, 2fr) 110px 90px minmax(160px, 2fr); }
summary::-webkit-details-marker { display: none; }
summary::before { content: "\\203a"; color: var(--muted); transition: transform .1s; }
details[open] > summary::before { transform: rotate(90deg); }
summary:hover { background: var(--sunken); }
summary .name { font-weight: 600; overflow-wrap: anywhere; }
summary .state { font-weight: 400; }
.inside { padding: 4px 14px 16px 42px; scroll-margin-top: 48px; }
.tables { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 250px), 1fr)); gap: 14px 28px;
  align-items: start; justify-items: start; }
.tables caption { padding-bottom: 2px; color: var(--muted); font-size: 12px; text-align: left; }
.tables th, .tables td { padding: 1px 12px 1px 0; font-family: var(--mono); font-size: 12px; vertical-align: top;
  overflow-wrap: anywhere; }
.tables th { color: var(--muted); font-weight: 400; }
.identity { display: grid; gap: 2px; margin-top: 14px; padding-top: 10px; border-top: 1px solid var(--line); }
.identity > div { display: grid; grid-template-columns: 130px 1fr; gap: 12px; align-items: baseline; }
.identity .digest { max-width: 100%; color: var(--text); }

.ancestry, .ancestry ul { list-style: none; }
.ancestry ul { margin-left: 7px; padding-left: 16px; border-left: 1px solid var(--line); }
.ancestry { max-width: 900px; }
.ancestry li > div { display: flex; flex-wrap: wrap; gap: 0 10px; align-items: baseline; padding: 1px 0;
  overflow-wrap: anywhere; }
.ancestry li > div:hover { background: var(--sunken); }
.ancestry .role, .ancestry .kind { color: var(--muted); }
.ancestry .kind { font-size: 12px; }
.ancestry .digest { margin-left: auto; }

@media (max-width: 760px) {
  body { padding: 18px 14px 40px; }
  .part { margin-top: 28px; }
  .facts { gap: 8px 20px; }
  .evaluations th, .evaluations td { padding: 4px 10px; }
  .evaluations tbody th { min-width: 120px; max-width: 38vw; white-space: normal; }
  .intervals, .intervals tbody, .intervals tr, .intervals th, .intervals td { display: block; width: auto; }
  .intervals caption { display: block; padding: 10px 14px; }
  .intervals thead { display: none; }
  .intervals tr { padding: 6px 0; border-top: 1px solid var(--line); }
  .intervals .plot { width: auto; padding: 0 28px; }
  .intervals tr.axis { padding: 0 0 6px; border-top: 0; }
  .intervals .axis td { padding-block: 0; }
  .intervals .axis td:nth-child(2) { padding: 0 28px; }
  .intervals .number { display: inline-block; text-align: left; }
  .intervals .number + td { display: inline-block; padding-left: 0; }
  .timeline .ruler span:not(:nth-child(4n + 1)), .timeline .ruler .pause { display: none; }
  .timeline tbody th { padding-right: 10px; max-width: 38vw; overflow: hidden; text-overflow: ellipsis; }
  .timeline .number { padding-left: 10px; }
  .tries { display: none; }
  summary { grid-template-columns: 14px 1fr auto; }
  summary .verb { grid-column: 2; } summary .state { grid-column: 3; grid-row: 1; }
  summary .state, summary .number { justify-self: end; }
  summary .number { grid-column: 3; grid-row: 2; } summary > span:last-child { display: none; }
  .inside { padding-left: 28px; }
  .identity > div { grid-template-columns: 1fr; gap: 0; }
}
@media print {
  body { max-width: none; background: none; } nav { display: none; } .part { break-inside: avoid-page; }
}
""")
