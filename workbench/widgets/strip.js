// Draws what Strip.drawn() worked out; whatever text comes in stays text, never markup.
const CHUNK = 200; // tokens that the browser may leave undrawn together while out of sight; a new line begins after them
const HINT = "Point at a token, or go in with Tab: arrow keys move, Enter selects, Escape leaves.";
const made = (tag, name, text = "", more = {}) =>
  Object.assign(document.createElement(tag), { className: `workbench-strip-${name}`, textContent: text, ...more });

function render({ model, el }) {
  const title = made("div", "title"), legend = made("div", "legend"), paper = made("div", "paper");
  const list = made("div", "tokens", "", { role: "listbox" }), line = made("div", "line", HINT, { role: "status" });
  paper.append(title, list, line, legend), el.append(paper);
  let tokens = [], places = [], said = [], texts = "", at = 0, told = null, chosen = null;
  const build = (rows) => {
    const page = document.createDocumentFragment(), inside = list.matches(":focus-within");
    [tokens, places, said, at, told, chosen] = [[], [], [], 0, null, null];
    rows.forEach((row, r) => {
      const group = page.appendChild(made("div", "row", "", { role: "group", ariaLabel: row.label || `row ${r + 1}` }));
      const text = made("div", "text", row.shown.length ? "" : "(no tokens)");
      row.shown.forEach((shown, i) => {
        if (i % CHUNK === 0) text.append(made("div", "chunk"));
        const token = made("span", "token", shown, { role: "option", ariaSelected: false, tabIndex: tokens[0] ? -1 : 0 });
        text.lastChild.append(token, shown.endsWith("↵") ? document.createElement("br") : "");
        token.k = tokens.push(token) - 1, places.push([r, i]);
      });
      group.append(rows.some(({ label }) => label) ? made("div", "label", row.label, { ariaHidden: true }) : "", text);
    });
    list.replaceChildren(page);
    if (inside) tokens[0]?.focus();
  };
  const paint = (rows) => places.forEach(([r, i], k) => {
    tokens[k].style.cssText = `background-color:${rows[r].ground[i]};color:${rows[r].ink[i]}`;
    said[k] = tokens[k].ariaLabel = tokens[k].title = rows[r].said[i];
    tokens[k].classList.toggle("dropped", rows[r].dropped[i]);
  });
  const say = (token, live = "off") => { // "off" where a screen reader reads the token itself, being there
    line.ariaLive = live;
    line.textContent = (told = token) ? said[token.k] : HINT;
  };
  const mark = () => {
    chosen?.setAttribute("aria-selected", "false");
    chosen = tokens[places.findIndex((place) => `${place}` === `${model.get("selected")}`)];
    chosen?.setAttribute("aria-selected", "true");
  };
  const update = () => {
    const { rows, legend: scale, title: words } = model.get("strip");
    const next = JSON.stringify(rows.map((row) => [row.label, row.shown]));
    if (next !== texts) build(rows), texts = next;
    paint(rows), mark(), say(told, "polite"); // the same tokens in other colours: what is read has a new value
    list.ariaLabel = title.textContent = words;
    const swatches = scale.colors.map((color) => made("span", "swatch", "", { style: `background-color:${color}` }));
    legend.replaceChildren(scale.low, ...swatches, scale.high);
  };
  const select = () => { // once more takes it back
    model.set("selected", tokens[at] === chosen ? [] : places[at]), model.save_changes();
  };
  const across = (step) => { // the token straight above or below; lines are where the browser broke them
    const box = (k) => tokens[k].getBoundingClientRect(), { left, top } = box(at);
    let k = at, best;
    while (tokens[k] && box(k).top === top) k += step;
    const off = (k) => Math.abs(box(k).left - left);
    for (best = k; tokens[k] && box(k).top === box(best).top; k += step) if (off(k) < off(best)) best = k;
    return best;
  };
  const moves = { ArrowLeft: () => at - 1, ArrowRight: () => at + 1, Home: () => 0, End: () => tokens.length - 1,
    ArrowUp: () => across(-1), ArrowDown: () => across(1) };
  const acts = { Enter: select, " ": select, Escape: () => (tokens[at].blur(), el.closest("[tabindex]")?.focus()) };
  const on = (name, does) => list.addEventListener(name, (event) => "k" in event.target && does(event.target, event));
  on("focusin", (token) => { tokens[at].tabIndex = -1, token.tabIndex = 0, at = token.k, say(token); });
  on("keydown", (token, event) => {
    if (event.ctrlKey || event.altKey || event.metaKey || (event.shiftKey && event.key === "Enter")) return;
    event.stopPropagation(); // a letter would reach JupyterLab: x cuts the cell around
    if (event.key in moves || event.key in acts) event.preventDefault();
    event.key in moves ? tokens[moves[event.key]()]?.focus() : acts[event.key]?.();
  });
  on("click", (token) => (token.focus(), select()));
  on("pointerover", (token) => say(token));
  for (const name of ["focusout", "pointerleave"]) list.addEventListener(name, () => say(list.querySelector(":focus")));
  model.on("change:strip", update), model.on("change:selected", mark), update();
  return () => (model.off("change:strip", update), model.off("change:selected", mark));
}
export default { render };
