"use strict";

const at = (id) => document.getElementById(id);
const whole = new Intl.NumberFormat("en");
let lines = []; // of the tokens of the text that is shown
let writing = false;
let following = true; // the newest token is the one shown
let compared = null; // the private text before, and its prompt

function megabytes(bytes) {
  return `${(bytes / 1e6).toPrecision(3)} MB`;
}

// A token on one line: what cannot be seen has a sign.
function visible(text) {
  return text.replaceAll("\n", "↵") || "(part of a letter)";
}

function draw(id, counts, highest) {
  const total = counts.reduce((sum, count) => sum + count, 0);
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", `0 0 ${counts.length} 100`);
  svg.setAttribute("preserveAspectRatio", "none");
  counts.forEach((count, index) => {
    const bar = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    const height = (100 * count) / highest;
    bar.setAttribute("x", index + 0.06);
    bar.setAttribute("width", 0.88);
    bar.setAttribute("y", 100 - height);
    bar.setAttribute("height", height);
    svg.append(bar);
  });
  const share = (count) => `${((100 * count) / total).toFixed(1)} percent`;
  at(id).setAttribute("aria-label", `Histogram of ${whole.format(total)} numbers in ${counts.length} bins of equal ` +
    `width: ${share(Math.max(...counts))} in the fullest, ${share(Math.min(...counts))} in the emptiest`);
  at(id).replaceChildren(svg);
}

function list(id, numbers) {
  at(id).replaceChildren(...numbers.map((number) => {
    const cell = document.createElement("span");
    cell.textContent = String(number).replace("-", "−");
    return cell;
  }));
}

function show(index) {
  const line = lines[index];
  document.querySelectorAll("#text .token").forEach((token, other) => token.classList.toggle("shown", other === index));
  at("step").value = index + 1;
  at("step").setAttribute("aria-valuetext", `token ${index + 1} of ${lines.length}: ${visible(line.text)}`);
  at("shown").textContent = visible(line.text).trim();
  at("time").textContent = `${whole.format(Math.round(line.milliseconds))} ms`;
  at("nothing").hidden = Boolean(line.seen);
  at("seen").hidden = !line.seen;
  at("sent").textContent = megabytes(line.sent ?? 0);
  at("returned").textContent = megabytes(line.received ?? 0);
  at("requests").textContent = whole.format(line.requests ?? 0);
  if (!line.seen) return;
  at("masks").textContent = whole.format(line.masks_left);
  const highest = Math.max(...line.seen.received.histogram, ...line.seen.true.histogram);
  for (const side of ["received", "true"]) {
    draw(`${side}-histogram`, line.seen[side].histogram, highest);
    list(`${side}-numbers`, line.seen[side].numbers);
  }
}

function add(line) {
  const token = document.createElement("span");
  const index = lines.push(line) - 1;
  token.className = "token";
  token.textContent = line.text;
  token.addEventListener("click", () => pick(index));
  at("text").append(token);
  at("step").max = lines.length;
  at("step").disabled = false;
  if (following) show(index);
}

function pick(index) {
  following = index === lines.length - 1;
  show(index);
}

function told(line, asked) {
  if (line.error) {
    at("status").textContent = `It did not work: ${line.error}`;
  } else if (line.end) {
    const text = lines.map((each) => each.text).join("");
    const rate = lines.length / line.seconds;
    let said = `Done: ${lines.length} tokens in ${line.seconds.toFixed(1)} s, ${rate.toFixed(1)} a second.`;
    if (asked.mode === "private") {
      compared = { ...asked, text };
    } else if (compared && compared.prompt === asked.prompt && compared.max_new_tokens === asked.max_new_tokens) {
      said += compared.text === text ? " It is the private text, letter by letter." : " It differs from the private text.";
    }
    at("status").textContent = said;
  } else {
    add(line);
  }
}

async function write(asked) {
  const answer = await fetch("generate", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(asked),
  });
  if (!answer.ok) throw new Error((await answer.json()).error);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    for (const part of parts) told(JSON.parse(part), asked);
  }
}

at("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (writing) return;
  const asked = {
    prompt: at("prompt").value,
    max_new_tokens: Number(at("count").value),
    mode: document.querySelector("[name=mode]:checked").value,
  };
  lines = [];
  following = true;
  const prompt = document.createElement("span");
  prompt.className = "prompt";
  prompt.textContent = asked.prompt;
  at("text").replaceChildren(prompt);
  at("step").disabled = true;
  writing = true;
  at("go").setAttribute("aria-disabled", "true"); // not disabled: it would lose the focus
  at("status").textContent = asked.mode === "private" ? "Writing; the server sees masked numbers…" : "Writing, all here…";
  try {
    await write(asked);
  } catch (error) {
    at("status").textContent = `It did not work: ${error.message}`;
  }
  writing = false;
  at("go").removeAttribute("aria-disabled");
});

at("step").addEventListener("input", () => pick(Number(at("step").value) - 1));

(async () => {
  const state = await (await fetch("state")).json();
  at("server").textContent = state.server;
  at("count").max = state.context;
  at("masks").textContent = whole.format(state.masks_left);
  at("matrices").textContent = whole.format(state.matrices);
  at("first-matrix").textContent = state.first_matrix;
  document.querySelector(".low").textContent = `−${whole.format(state.largest)}`;
  document.querySelector(".high").textContent = whole.format(state.largest);
  document.querySelector("[value=float]").disabled = !state.float;
  at("no-float").hidden = state.float;
})();
