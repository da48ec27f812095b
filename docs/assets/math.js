document.addEventListener("DOMContentLoaded", () => {
  renderMathInElement(document.body, {
    delimiters: [
      { left: "\\[", right: "\\]", display: true },
      { left: "\\(", right: "\\)", display: false },
    ],
  });
  // A line may end behind a formula, but not before the mark that follows it.
  document.querySelectorAll("span.arithmatex").forEach((formula) => {
    const text = formula.nextSibling;
    const last = [...formula.querySelectorAll(".katex-html > .base")].pop();
    const mark = text?.nodeType === Node.TEXT_NODE && text.data.match(/^[.,;:!?]+/);
    if (!last || !mark) return;
    const kept = document.createElement("span");
    kept.style.whiteSpace = "nowrap";
    last.replaceWith(kept);
    kept.append(last, mark[0]);
    text.data = text.data.slice(mark[0].length);
  });
});
