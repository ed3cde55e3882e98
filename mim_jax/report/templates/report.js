// Shows one sheet of pictures at a time. Without this script all of them are shown.
for (const film of document.querySelectorAll(".film")) {
  const frames = [...film.querySelectorAll("img")];
  const slider = film.querySelector("input");
  const output = film.querySelector("output");
  const show = () => {
    frames.forEach((frame, i) => { frame.hidden = i !== slider.valueAsNumber; });
    output.textContent = frames[slider.valueAsNumber].alt;
    slider.setAttribute("aria-valuetext", output.textContent);
  };
  film.querySelector(".slider").hidden = frames.length < 2;
  slider.addEventListener("input", show);
  show();
}
