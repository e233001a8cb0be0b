// A page from a file may start no worker, as the search does: here its script runs in a frame, and gets its messages.
if (location.protocol === "file:")
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      this.started = new Promise((done) => {
        frame.onload = () => {
          this.global = frame.contentWindow;
          this.global.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
          const script = this.global.document.createElement("script");
          script.src = new URL(url, location);
          script.onload = done;
          this.global.document.body.append(script);
        };
      });
      document.body.append(frame);
    }

    postMessage(data) {
      this.started.then(() => this.global.dispatchEvent(new MessageEvent("message", { data })));
    }
  };
