// On a phone site.css shows the rows of some tables as lists, where each cell names its column.
document.addEventListener("DOMContentLoaded", () =>
  document.querySelectorAll(".md-typeset table").forEach((table) => {
    const heads = [...table.querySelectorAll("thead th")].map((head) => head.textContent);
    table.querySelectorAll("tbody tr").forEach((row) => [...row.cells].forEach((cell, i) => (cell.dataset.head = heads[i])));
  }),
);
