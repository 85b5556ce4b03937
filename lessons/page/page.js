// A button at each cell that copies its code; on a narrow page the contents begin folded.
"use strict";
for (const block of document.querySelectorAll(".input_area .highlight")) {
  const button = document.createElement("button");
  button.className = "copy";
  button.type = "button";
  button.textContent = "Copy";
  button.addEventListener("click", async () => {
    const code = block.querySelector("pre").textContent.replace(/\n$/, "");
    try {
      await navigator.clipboard.writeText(code);
      button.textContent = "Copied";
    } catch {
      // Without a secure address there is no clipboard: select the code for the reader to copy.
      getSelection().selectAllChildren(block.querySelector("pre"));
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });
  block.append(button);
}
if (matchMedia("(max-width: 75rem)").matches) document.querySelector(".contents").open = false;
