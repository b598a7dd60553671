import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;

/** JDK's HttpClient as it comes, which offers HTTP/2 on every clear-text request, and limited to HTTP/1.1: `java JavaClient.java`. */
public class JavaClient {
    public static void main(String[] arguments) throws Exception {
        for (var version : HttpClient.Version.values()) {
            for (var stream : new boolean[] {false, true}) {
                ask(version, stream);
            }
        }
    }

    static void ask(HttpClient.Version version, boolean stream) throws Exception {
        var environment = System.getenv();
        var body = "{\"model\":\"" + environment.get("CLIENT_MODEL") + "\",\"max_tokens\":8,\"stream\":" + stream
            + ",\"messages\":[{\"role\":\"user\",\"content\":\"What is the capital of France?\"}]}";
        var request = HttpRequest.newBuilder(URI.create(environment.get("CLIENT_URL") + "/chat/completions"))
            .header("content-type", "application/json")
            .header("authorization", "Bearer " + environment.get("CLIENT_KEY"))
            .POST(HttpRequest.BodyPublishers.ofString(body)).build();
        var client = HttpClient.newBuilder().version(version).build();
        var detail = "";
        var ok = false;
        try {
            for (var number = 0; number < 3; number++) {
                var answer = client.send(request, HttpResponse.BodyHandlers.ofString());
                ok = answer.statusCode() == 200 && answer.body().contains(stream ? "data: [DONE]" : "\"choices\"");
                detail = answer.statusCode() + ", " + answer.body().length() + " characters, " + answer.version();
                if (!ok) {
                    break;
                }
            }
        } catch (Exception error) {
            detail = error.toString();
        }
        System.out.println("{\"client\":\"JDK " + Runtime.version().feature() + " HttpClient\",\"step\":\"" + version
            + (stream ? " stream" : "") + "\",\"ok\":" + ok + ",\"detail\":\"" + detail.replace("\"", "'") + "\"}");
    }
}
