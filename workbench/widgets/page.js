// The controls of an exported desk: each picks one of the values that were worked out; nothing is computed here.
const grid = JSON.parse(document.getElementById("grid").textContent);
const place = grid.start.slice(); // of each setting among its values
const area = document.getElementById("controls"), words = document.getElementById("words");
const figure = document.getElementById("figure"), rest = document.getElementById("rest");

function show() {
  const index = grid.settings.reduce((sum, setting, k) => sum * setting.values.length + place[k], 0);
  const picture = grid.pictures[index];
  words.textContent = picture.refused || "";
  if (picture.refused) return; // the last picture stays
  const layout = Object.assign({}, picture.figure.layout, { template: grid.template, autosize: true });
  Plotly.react(figure, picture.figure.data, layout, { responsive: true, displaylogo: false });
  rest.innerHTML = picture.html; // written by the program, escaped there
  window.history.replaceState(null, "", "#" + place.join(","));
}

function made(setting, k) {
  const label = document.createElement("label"), name = document.createElement("span");
  name.textContent = setting.label;
  const input = document.createElement(setting.numbers ? "input" : "select");
  const told = document.createElement("output");
  if (setting.numbers) {
    Object.assign(input, { type: "range", min: 0, max: setting.values.length - 1, step: 1 });
  } else {
    setting.values.forEach((value, n) => input.add(new Option(value, n)));
  }
  const tell = () => {
    told.textContent = setting.numbers ? setting.values[place[k]] : "";
    input.setAttribute("aria-valuetext", setting.values[place[k]]);
  };
  input.value = place[k];
  input.addEventListener("input", () => { place[k] = Number(input.value); tell(); show(); });
  tell();
  label.append(name, input, told);
  return label;
}

// Where nothing follows the #, or no numbers, parseInt gives NaN, which is no place; Number("") would be the first.
const asked = window.location.hash.slice(1).split(",").map((part) => parseInt(part, 10));
if (asked.length === place.length && asked.every((n, k) => n >= 0 && n < grid.settings[k].values.length)) {
  asked.forEach((n, k) => { place[k] = n; });
}
area.append(...grid.settings.map(made));
show();
