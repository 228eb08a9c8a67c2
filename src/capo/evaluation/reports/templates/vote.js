"use strict";
// One pair at a time: an answer is sent, and only when the server has saved it does the next pair appear.
const KEYS = { ArrowLeft: "left", ArrowRight: "right", ArrowDown: "tie" };
const SMALL = 160; // pixels; smaller images are enlarged without interpolation, as in reports
const rater = (new URLSearchParams(location.search).get("rater") || "").trim();
const ties = document.body.dataset.ties === "yes";
const at = (id) => document.getElementById(id);
const before = []; // pairs answered on this page, for the way back
let pair = null; // what is shown
let ready = false; // both images can be seen, and no answer is under way
let since = 0;

function fault(text) {
  at("fault").textContent = text;
  at("fault").hidden = !text;
}

async function ask(path, body) {
  const options = body && { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  const answer = await fetch(path, options);
  const found = await answer.json();
  if (!answer.ok) throw new Error(found.error);
  return found;
}

async function show(next) {
  pair = next;
  ready = false;
  at("work").hidden = !next.pair;
  at("end").hidden = Boolean(next.pair);
  if (!next.pair) return;
  at("prompt").textContent = next.prompt;
  at("count").textContent = `${next.done} of ${next.total} done`;
  at("back").disabled = !before.length;
  for (const side of ["left", "right"]) {
    const image = at(side);
    image.src = `image?${new URLSearchParams({ pair: next.pair, side, rater })}`;
  }
  try {
    await Promise.all([at("left").decode(), at("right").decode()]);
  } catch (error) {
    fault("An image could not be loaded: reload the page.");
    return;
  }
  for (const side of ["left", "right"]) at(side).classList.toggle("small", at(side).naturalWidth <= SMALL);
  since = performance.now();
  ready = true;
}

async function give(answer) {
  if (!ready || (answer === "tie" && !ties)) return;
  ready = false;
  const seconds = (performance.now() - since) / 1000;
  try {
    const next = await ask("vote", { rater, pair: pair.pair, answer, seconds });
    before.push(pair);
    fault("");
    await show(next);
  } catch (error) {
    fault(`This vote was not saved (${error.message}). Give it again when the server runs.`);
    ready = true;
  }
}

function back() {
  if (ready && before.length) show(before.pop());
}

document.addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.altKey || event.metaKey || !pair) return;
  if (event.key in KEYS) {
    event.preventDefault();
    give(KEYS[event.key]);
  } else if (event.key === "Backspace") {
    event.preventDefault();
    back();
  }
});
for (const button of document.querySelectorAll("[data-answer]")) {
  button.addEventListener("click", () => { button.blur(); give(button.dataset.answer); });
}
at("back").addEventListener("click", back);

if (rater) {
  ask(`next?${new URLSearchParams({ rater })}`).then(show, (error) => fault(error.message));
} else {
  at("enter").hidden = false;
  at("name").focus();
}
