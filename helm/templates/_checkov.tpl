{{/* Why checkov's rules are not followed where they are not; (list $ "CKV_…" …) becomes annotations. */}}
{{- define "lowbit.checkovSkips" -}}
{{- $values := (first .).Values -}}
{{- $reasons := dict
    "CKV_K8S_8" "it runs once and ends"
    "CKV_K8S_9" "it runs once and ends"
    "CKV_K8S_8:follower" "it answers nobody and ends when a worker or its leader does; a group restarts as one"
    "CKV_K8S_9:follower" "it answers nobody; its leader is ready when it is"
    "CKV_K8S_11" "a CPU limit throttles the engine between two steps; the request reserves what it needs"
    "CKV_K8S_15" "a version is never pushed again and latest is refused; image.digest settles it"
    "CKV_K8S_35" "lowbit loadtest reads its key from the environment and ends with the test"
    "CKV_K8S_43" "the values give no image.digest" -}}
{{- $ids := rest . -}}
{{- if not $values.image.digest -}}
{{- $ids = concat $ids (list "CKV_K8S_15" "CKV_K8S_43") -}}
{{- end -}}
{{- range $number, $id := $ids }}
checkov.io/skip{{ add1 $number }}: {{ printf "%s=%s" (splitList ":" $id | first) (get $reasons $id) | quote }}
{{- end -}}
{{- end -}}
