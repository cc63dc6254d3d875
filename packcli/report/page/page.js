"use strict";
// Sorting, folding and single cells. Everything is readable without: what only a script can do is shown by it.
(() => {
  const root = document.documentElement;
  document.querySelector(".tools").hidden = false;

  const asButton = (holder) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...holder.childNodes);
    holder.append(button);
    return button;
  };

  // Lines as units that stay together: a group's line, then those of its single cells.
  const unitsOf = (body) => {
    const units = [];
    for (const row of body.rows) {
      if (row.classList.contains("setting")) continue;
      if (row.classList.contains("single")) units.at(-1).push(row);
      else units.push([row]);
    }
    return units;
  };

  const compare = (a, b) => {
    const [x, y] = [Number(a), Number(b)];
    if (a !== "" && b !== "" && !Number.isNaN(x) && !Number.isNaN(y)) return x - y;
    return String(a).localeCompare(String(b), "en", { numeric: true });
  };

  const sort = (table, column, direction) => {
    const keyOf = (row) => (column === 0 ? row.cells[0].textContent : row.cells[column].dataset.v);
    for (const body of table.tBodies) {
      const units = body.units ?? (body.units = unitsOf(body)); // in the order of the sweep
      const sorted = [...units];
      if (direction) {
        sorted.sort(([a], [b]) => {
          const [x, y] = [keyOf(a), keyOf(b)];
          if (x === undefined || y === undefined) return (x === undefined) - (y === undefined); // unknown ones last
          return direction * compare(x, y);
        });
      }
      for (const unit of sorted) body.append(...unit);
    }
  };

  const NEXT = { none: ["ascending", 1], ascending: ["descending", -1], descending: ["none", 0] };
  for (const table of document.querySelectorAll("table")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      if (!head.hasAttribute("aria-sort")) return;
      asButton(head).addEventListener("click", () => {
        const [state, direction] = NEXT[head.getAttribute("aria-sort")];
        for (const other of table.querySelectorAll("[aria-sort]")) other.setAttribute("aria-sort", "none");
        head.setAttribute("aria-sort", state);
        sort(table, column, direction);
      });
    });
  }

  // A table that is wider than the page says so, with a shadow at each side that has more.
  for (const box of document.querySelectorAll(".scroll")) {
    const look = () => {
      const hidden = box.scrollWidth - box.clientWidth;
      box.parentElement.previousElementSibling.hidden = hidden < 1;
      box.parentElement.classList.toggle("before", box.scrollLeft > 1);
      box.parentElement.classList.toggle("behind", box.scrollLeft < hidden - 1);
    };
    box.addEventListener("scroll", look, { passive: true });
    const sizes = new ResizeObserver(look);
    for (const one of [box, ...box.children]) sizes.observe(one);
  }

  const isFolded = (row) => row.parentElement.classList.contains("folded");
  const settings = [...document.querySelectorAll("tr.setting")].map((row) => {
    const button = asButton(row.querySelector("th"));
    const fold = (folded) => {
      row.parentElement.classList.toggle("folded", folded);
      button.setAttribute("aria-expanded", String(!folded));
    };
    fold(isFolded(row));
    button.addEventListener("click", () => fold(!isFolded(row)));
    return { row, fold };
  });

  const all = document.getElementById("fold");
  const name = (folded) => (all.textContent = folded ? "unfold all settings" : "fold all settings");
  all.hidden = settings.length === 0;
  name(settings.length > 0 && settings.every(({ row }) => isFolded(row)));
  all.addEventListener("click", () => {
    const folded = settings.some(({ row }) => !isFolded(row));
    for (const { fold } of settings) fold(folded);
    name(folded);
  });

  document.getElementById("singles")?.addEventListener("change", (event) => {
    root.classList.toggle("singles", event.target.checked);
  });

  document.getElementById("save").addEventListener("click", () => {
    const data = document.getElementById("report").textContent;
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([data], { type: "application/json" }));
    link.download = "report.json";
    link.click();
    URL.revokeObjectURL(link.href);
  });
})();
