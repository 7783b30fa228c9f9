
"use strict";
(() => {
  // Every text goes in as textContent: whatever a model wrote stays text.
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const choices = [...document.querySelectorAll("[data-vote]")];
  const kept = `reinforcepp compare ${data.id}`;
  let place = 0;
  let votes = recall(); // of each pair: 1 or 2 for the answer that was chosen, 0 for a tie, null for none yet

  function recall() {
    try {
      const found = JSON.parse(localStorage.getItem(kept));
      const sound = Array.isArray(found) && found.length === data.pairs.length;
      if (sound && found.every((vote) => [0, 1, 2, null].includes(vote))) return found;
    } catch {} // no storage for this page, or not ours: the votes last as long as the page is open
    return data.pairs.map(() => null);
  }

  function remember() {
    try {
      localStorage.setItem(kept, JSON.stringify(votes));
    } catch {}
  }

  function sideOf(pair, vote) {
    return vote === 0 ? "tie" : pair.answers[vote - 1].side;
  }

  function show() {
    const pair = data.pairs[place];
    const open = at("reveal").checked || votes[place] !== null;
    at("place").textContent = `Prompt ${place + 1} of ${data.pairs.length}`;
    at("prompt").textContent = pair.prompt;
    pair.answers.forEach((answer, i) => {
      const text = at(`text-${i + 1}`);
      text.textContent = answer.text || "(empty)";
      text.classList.toggle("empty", !answer.text);
      text.parentElement.classList.toggle("picked", votes[place] === i + 1);
      at(`cut-${i + 1}`).textContent = answer.cut ? "cut off at the length limit" : "";
      at(`name-${i + 1}`).textContent = open
        ? `${answer.side}: ${data.names[answer.side]}, judge's score ${answer.score}`
        : "";
    });
    choices.forEach((button) => (button.disabled = open));
    at("previous").disabled = place === 0;
    at("next").disabled = place === data.pairs.length - 1;
    at("told").textContent = told(pair, open);
    at("tally").textContent = tally();
    at("forget").hidden = votes.every((vote) => vote === null);
  }

  function told(pair, open) {
    if (!open) return "";
    const judge = pair.better === "tie" ? "calls it a tie" : `prefers ${pair.better}`;
    if (votes[place] === null) return `The judge ${judge}. Votes count only while names are hidden.`;
    const own = sideOf(pair, votes[place]);
    const first = own === "tie" ? "You called it a tie" : `You chose answer ${votes[place]}, which is ${own}'s`;
    return own === pair.better ? `${first}, like the judge.` : `${first}; the judge ${judge}.`;
  }

  function tally() {
    const cast = data.pairs.map((pair, i) => [pair, votes[i]]).filter(([, vote]) => vote !== null);
    if (!cast.length) return "No votes yet.";
    const sides = cast.map(([pair, vote]) => sideOf(pair, vote));
    const [a, b, ties] = ["A", "B", "tie"].map((side) => sides.filter((own) => own === side).length);
    const agreed = cast.filter(([pair], i) => pair.better === sides[i]).length;
    const rate = ((b + ties / 2) / cast.length).toFixed(2);
    return (
      `Your votes, ${cast.length} of ${votes.length}: A ${a}, B ${b}, ties ${ties}; ` +
      `win rate of B ${rate}. The judge agrees with you on ${agreed}.`
    );
  }

  function vote(choice) {
    if (votes[place] !== null || at("reveal").checked) return;
    votes[place] = choice;
    remember();
    show();
    if (!at("next").disabled) at("next").focus(); // the button that was used is off now
  }

  function go(step) {
    const target = place + step;
    if (target < 0 || target >= data.pairs.length) return;
    place = target;
    show();
    at("prompt").focus(); // so that the new prompt is in view, and is read out
  }

  choices.forEach((button) => button.addEventListener("click", () => vote(Number(button.dataset.vote))));
  at("previous").addEventListener("click", () => go(-1));
  at("next").addEventListener("click", () => go(1));
  at("reveal").addEventListener("change", show);
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
  place = open < 0 ? 0 : open;
  at("voting").hidden = false;
  show();
})();
