
"use strict";
(() => {
  // All texts are set as textContent, so model output stays text.
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const choices = [...document.querySelectorAll("[data-vote]")];
  const storageKey = `reinforcepp compare ${data.id}`;
  let position = 0;
  let votes = recall(); // per pair: 1 or 2 for the chosen response, 0 for a tie, null for no vote

  function recall() {
    try {
      const found = JSON.parse(localStorage.getItem(storageKey));
      const valid = Array.isArray(found) && found.length === data.pairs.length;
      if (valid && found.every((vote) => [0, 1, 2, null].includes(vote))) return found;
    } catch {} // without storage or with invalid contents, votes last while the page is open
    return data.pairs.map(() => null);
  }

  function remember() {
    try {
      localStorage.setItem(storageKey, JSON.stringify(votes));
    } catch {}
  }

  function sideOf(pair, vote) {
    return vote === 0 ? "tie" : pair.responses[vote - 1].side;
  }

  function show() {
    const pair = data.pairs[position];
    const open = at("reveal").checked || votes[position] !== null;
    at("position").textContent = `Prompt ${position + 1} of ${data.pairs.length}`;
    [...at("prompt").children].forEach((prompt, i) => (prompt.hidden = i !== pair.prompt));
    pair.responses.forEach((response, i) => {
      const text = at(`text-${i + 1}`);
      text.textContent = response.text || "(empty)";
      text.classList.toggle("empty", !response.text);
      text.parentElement.classList.toggle("picked", votes[position] === i + 1);
      at(`truncated-${i + 1}`).textContent = response.truncated ? "truncated at the length limit" : "";
      at(`name-${i + 1}`).textContent = open
        ? `${response.side}: ${data.names[response.side]}, judge score ${response.score}`
        : "";
    });
    choices.forEach((button) => (button.disabled = open));
    at("previous").disabled = position === 0;
    at("next").disabled = position === data.pairs.length - 1;
    at("result").textContent = result(pair, open);
    at("tally").textContent = tally();
    at("save").hidden = at("forget").hidden = votes.every((vote) => vote === null);
  }

  function result(pair, open) {
    if (!open) return "";
    const judge = pair.better === "tie" ? "calls it a tie" : `prefers ${pair.better}`;
    if (votes[position] === null) return `The judge ${judge}. Votes count only while names are hidden.`;
    const side = sideOf(pair, votes[position]);
    const first = side === "tie" ? "You called it a tie" : `You chose response ${votes[position]}, by ${side}`;
    return side === pair.better ? `${first}, and the judge agrees.` : `${first}. The judge ${judge}.`;
  }

  function tally() {
    const cast = data.pairs.map((pair, i) => [pair, votes[i]]).filter(([, vote]) => vote !== null);
    if (!cast.length) return "No votes yet.";
    const sides = cast.map(([pair, vote]) => sideOf(pair, vote));
    const [a, b, ties] = ["A", "B", "tie"].map((side) => sides.filter((each) => each === side).length);
    const agreed = cast.filter(([pair], i) => pair.better === sides[i]).length;
    const rate = ((b + ties / 2) / cast.length).toFixed(2);
    return (
      `You voted on ${cast.length} of ${votes.length}: A ${a}, B ${b}, ties ${ties}; ` +
      `win rate of B ${rate}. The judge agrees with ${agreed} of your votes.`
    );
  }

  function vote(choice) {
    if (votes[position] !== null || at("reveal").checked) return;
    votes[position] = choice;
    remember();
    show();
    if (!at("next").disabled) at("next").focus(); // the clicked button is disabled now
  }

  // Writes a line per vote, for "reinforcepp label import".
  function save() {
    const lines = data.pairs.flatMap((pair, i) => {
      if (votes[i] === null) return [];
      const line = { prompt: data.prompts[pair.prompt], vote: sideOf(pair, votes[i]), temperature: data.temperature };
      for (const { side, text, truncated } of pair.responses) {
        const name = side.toLowerCase();
        Object.assign(line, { [`answer_${name}`]: text, [`model_${name}`]: data.names[side], [`truncated_${name}`]: truncated });
      }
      if (Object.keys(pair.kwargs).length) line.chat_template_kwargs = pair.kwargs;
      return [JSON.stringify(line) + "\n"];
    });
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob(lines, { type: "application/jsonl" }));
    link.download = "votes.jsonl";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  function go(step) {
    const target = position + step;
    if (target < 0 || target >= data.pairs.length) return;
    position = target;
    show();
    at("prompt").focus(); // so that the new prompt is visible and screen readers read it
  }

  choices.forEach((button) => button.addEventListener("click", () => vote(Number(button.dataset.vote))));
  at("previous").addEventListener("click", () => go(-1));
  at("next").addEventListener("click", () => go(1));
  at("reveal").addEventListener("change", show);
  at("save").addEventListener("click", save);
  at("forget").addEventListener("click", () => {
    votes = data.pairs.map(() => null);
    remember();
    show();
    at("prompt").focus();
  });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const action = {
      0: () => vote(0),
      1: () => vote(1),
      2: () => vote(2),
      ArrowLeft: () => go(-1),
      ArrowRight: () => go(1),
    }[event.key];
    if (!action) return;
    event.preventDefault();
    action();
  });
  const open = votes.indexOf(null);
  position = open < 0 ? 0 : open;
  at("voting").hidden = false;
  show();
})();
